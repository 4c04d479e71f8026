"""Measures of generated texts: exact matches, and ROUGE and BLEU by the libraries that the field compares with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from bmgraph.errors import BackendError, InputError
from bmgraph.utils.did_you_mean import did_you_mean

ROUGE = ("rouge1", "rouge2", "rougeL")
ABSENT = "{} is measured by the library {}, which is not installed: pip install 'bmgraph[metrics]'"


@dataclass(frozen=True)
class TextMeasures:
    """exact: the share of texts that are the expected ones, but for space around them. scores: others by name, from 0 to 1 for
    rouge1, rouge2 and rougeL (means of F1, by rouge-score, with stemming), from 0 to 100 for bleu (of the corpus, by sacrebleu).
    """

    exact: float
    scores: dict[str, float]

    @staticmethod
    def of(found: Sequence[str], expected: Sequence[str], scores: Sequence[str] = ()) -> TextMeasures:
        """The measures of texts, beside those that they should be; scores: "rouge", "bleu" or both (extra: metrics).

        Raises InputError where the texts differ in number, without texts, and for an unknown score; BackendError if its
        library is not installed.

        Example:
            >>> TextMeasures.of(["a cat", "dogs"], ["a cat", "a dog"]).exact
            0.5
        """
        if len(found) != len(expected) or not found:
            raise InputError(
                f"{len(found)} texts were written, and {len(expected)} are expected: give as many, one or more"
            )
        for name in scores:
            if name not in SCORES:
                raise InputError(
                    f"scores: {name!r} is not known{did_you_mean(name, SCORES)} (choose of {', '.join(SCORES)})"
                )
        right = [one.strip() == other.strip() for one, other in zip(found, expected)]
        measured: dict[str, float] = {}
        for name in scores:
            measured |= SCORES[name](found, expected)
        return TextMeasures(fmean(right), measured)


def _rouge(found: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise BackendError(ABSENT.format("ROUGE", "rouge-score")) from error
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    each = [scorer.score(other, one) for one, other in zip(found, expected)]
    return {name: fmean(scores[name].fmeasure for scores in each) for name in ROUGE}


def _bleu(found: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    try:
        from sacrebleu import corpus_bleu
    except ImportError as error:
        raise BackendError(ABSENT.format("BLEU", "sacrebleu")) from error
    return {"bleu": float(corpus_bleu(list(found), [list(expected)]).score)}


SCORES: Mapping[str, Callable[[Sequence[str], Sequence[str]], dict[str, float]]] = {
    "rouge": _rouge,
    "bleu": _bleu,
}

FIGURES: Mapping[str, tuple[str, ...]] = {"rouge": ROUGE, "bleu": ("bleu",)}
"""Score -> the figures that it gives."""
