"""Verbalizer: classes by the words that the model predicts at the mask, with calibration."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from bmgraph.errors import InputError
from bmgraph.prompting.class_scores import ClassScores, checked_classes
from bmgraph.prompting.knowledge import fitted_weights, relevances
from bmgraph.prompting.text_files import chosen, small_text
from bmgraph.prompting.vocabulary import Vocabulary
from bmgraph.prompting.word_generation import generated_words
from bmgraph.prompting.word_search import found_words
from bmgraph.prompting.word_table import (
    WordTable,
    check_distinct,
    ids_by_class,
    ids_of,
    known_word,
    read_ids,
    words_by_class,
)

WORDS = ("mean", "first", "max")
"""How the scores of a class's words become one."""

LARGEST_FILE = 2**24


class Verbalizer(ClassScores):
    """Each class by one or several words: its score is the log-probability of its words, among all words, at the mask.

    label_words: class -> a word or a list of words; one that begins with `<!>` gets no prefix. prefix: stands in front of each
    word, a space by default, since a word within a text begins with one. tokens: how the logits of a word's tokens become one,
    "first", "mean" or "max". words: how the words of a class do, "mean", "first" or "max". special: see `Template`.

    With `calibrated` the probabilities of words are divided by those for a text without content (Zhao et al. 2021,
    arXiv:2102.09690). Of many words from a knowledge base (KPT, Hu et al. 2022, arXiv:2108.02035), `knowledgeable` takes those
    that the tokenizer has, `without_rare` and `without_irrelevant` drop some, and `weighted` learns how much each counts.

    Raises InputError for a class without words, a word outside the vocabulary, and two classes with the same words.
    """

    kind: ClassVar[str] = "words"

    def __init__(
        self,
        label_words: Mapping[str, str | Sequence[str]],
        tokenizer: object,
        *,
        prefix: str = " ",
        tokens: str = "first",
        words: str = "mean",
        special: Mapping[str, str] | None = None,
    ) -> None:
        by_class = words_by_class(label_words)
        ids = ids_by_class(by_class, Vocabulary.of(tokenizer, special), prefix)
        shown = tuple(tuple(map(str, given)) for given in by_class.values())
        self._set(tuple(by_class), shown, WordTable(ids, tokens), words, None)

    def _set(
        self,
        classes: tuple[str, ...],
        label_words: tuple[tuple[str, ...], ...],
        table: WordTable,
        words: str,
        prior: torch.Tensor | None,
        shares: torch.Tensor | None = None,
    ) -> Self:
        if words not in WORDS:
            raise InputError(f"words={words!r}: choose one of {', '.join(WORDS)}")
        self.classes = checked_classes(classes)
        read = [frozenset(words) for words in read_ids(table.ids, table.tokens)]
        check_distinct(read, self.classes, table.tokens)
        self.label_words, self.table, self.words, self.prior = label_words, table, words, prior
        self.shares = shares
        return self

    def scores(self, values: torch.Tensor) -> torch.Tensor:
        """logits f[B, 1, V] at the mask -> log-probabilities of classes' words f[B, C], not normalised over classes."""
        return self._joined(self._word_scores(values[:, 0]))

    def _word_scores(self, logits: torch.Tensor) -> torch.Tensor:
        """logits f[B, V] -> calibrated log-probabilities of words f[B, C, W], -inf where there is none."""
        found = _normalised(self.table.word_logits(logits))
        if self.prior is not None:
            found = _normalised(found - self.prior.to(found))
        return found

    def _joined(self, found: torch.Tensor) -> torch.Tensor:
        if self.shares is not None:
            there = self.table.words.to(found.device)
            return (found.masked_fill(~there, 0.0) * self.shares.to(found)).sum(-1)
        if self.words == "first":
            return found[..., 0]
        if self.words == "max":
            return found.amax(-1)
        there = self.table.words.to(found.device)
        return found.masked_fill(~there, 0.0).sum(-1) / there.sum(-1)

    def calibrated(self, logits: torch.Tensor) -> Self:
        """The verbalizer whose words' probabilities are divided by those of `logits` f[V] or f[N, V], their mean: what the model
        says at the mask of texts without content."""
        mean = _mean_logits(logits)
        there = self.table.words
        prior = _normalised(self.table.word_logits(mean[None]))[0].masked_fill(~there, 0.0)
        return copy(self)._set(self.classes, self.label_words, self.table, self.words, prior, self.shares)

    def without_rare(self, logits: torch.Tensor, fraction: float = 0.5) -> Self:
        """The verbalizer without words a token of which is among the `fraction` of the vocabulary that `logits` f[V] or f[N, V], of
        texts of any content, rank lowest. Raises InputError where a class would have none left."""
        if not 0 <= fraction < 1:
            raise InputError(f"fraction={fraction}: give a share of the vocabulary, from 0 to less than 1")
        mean = _mean_logits(logits)
        rare = set(torch.argsort(mean, stable=True)[: int(fraction * len(mean))].tolist())
        kept = [
            [place for place, word in enumerate(words) if rare.isdisjoint(word)] for words in self.table.ids
        ]
        return self._of(kept, f"a smaller fraction than {fraction}")

    def without_irrelevant(self, logits: torch.Tensor) -> Self:
        """The verbalizer without words that are no closer to their own class than to others: by `logits` f[N, V] of texts of any
        content, over which the probabilities of a word are compared with those of each class's first word, which is to be its name.
        """
        if logits.dim() != 2 or len(logits) < 2:
            raise InputError(f"the logits have shape {list(logits.shape)}: give [N, V], of 2 rows or more")
        found = relevances(self.table.word_logits(torch.log_softmax(logits.detach().float().cpu(), -1)).exp())
        kept = [
            [place for place in range(len(words)) if found[index, place] >= 1 or place == 0]
            for index, words in enumerate(self.table.ids)
        ]
        return self._of(kept, "others")

    def weighted(
        self, logits: torch.Tensor, labels: torch.Tensor, *, steps: int = 200, lr: float = 0.1
    ) -> Self:
        """The verbalizer whose words count by shares that are learned from `logits` f[N, V] at the masks of labelled rows, labels
        i64[N], by `steps` of Adam; the model stays as it is. Words of a class count alike before."""
        if logits.dim() != 2 or not len(logits):
            raise InputError(f"the logits have shape {list(logits.shape)}: give [N, V], of 1 row or more")
        scores = self._word_scores(logits.detach().float().cpu())
        shares = fitted_weights(scores, self.table.words, labels, steps, lr)
        return copy(self)._set(self.classes, self.label_words, self.table, self.words, self.prior, shares)

    def _of(self, kept: Sequence[Sequence[int]], advice: str) -> Self:
        """The verbalizer with some of each class's words, by their places; without prior and shares, which are of all words."""
        for name, places in zip(self.classes, kept):
            if not places:
                raise InputError(f"no word of class {name!r} is left: give more words, or {advice}")
        ids = tuple(tuple(words[place] for place in places) for words, places in zip(self.table.ids, kept))
        shown = tuple(
            tuple(words[place] for place in places) for words, places in zip(self.label_words, kept)
        )
        return copy(self)._set(self.classes, shown, WordTable(ids, self.table.tokens), self.words, None)

    @classmethod
    def knowledgeable(
        cls,
        label_words: Mapping[str, str | Sequence[str]],
        tokenizer: object,
        *,
        longest: int = 1,
        **options: Any,
    ) -> Self:
        """The verbalizer of those words that the tokenizer makes of at most `longest` ids, none of them unknown; others are dropped.

        options: as of the class. Raises InputError where a class has none left.
        """
        if type(longest) is not int or longest < 1:
            raise InputError(f"longest={longest!r}: give a number of ids, 1 or more")
        vocabulary = Vocabulary.of(tokenizer, options.pop("special", None))
        by_class, prefix = words_by_class(label_words), options.get("prefix", " ")
        kept = {
            name: [word for word in words if known_word(word, vocabulary, prefix, longest)]
            for name, words in by_class.items()
        }
        for name, words in kept.items():
            if not words:
                raise InputError(
                    f"no word of class {name!r} is in the vocabulary with at most {longest} ids: give others, or more of longest="
                )
        return cls(kept, vocabulary, **options)  # type: ignore[arg-type]

    @classmethod
    def searched(
        cls,
        logits: torch.Tensor,
        labels: torch.Tensor,
        classes: Sequence[str],
        tokenizer: object,
        *,
        count: int = 1,
        candidates: int = 1000,
        score: str = "llr",
        balance: bool = True,
        letters: bool = False,
        special: Mapping[str, str] | None = None,
    ) -> Self:
        """The words that tell classes best, found among all tokens (PETAL, Schick et al. 2020, arXiv:2010.13641).

        logits f[N, V] at the masks of labelled rows, labels i64[N]. `count` words a class, among the `candidates` likeliest of
        its rows; score: "llr", the likelihood ratio, or "ce"; balance: weigh the rows of other classes to be as many as its own;
        letters: of tokens of two letters or more alone.
        """
        vocabulary = Vocabulary.of(tokenizer, special)
        allowed = vocabulary.of_letters if letters else None
        found = found_words(logits, labels, len(classes), count, candidates, score, balance, allowed)
        return cls._of_ids(classes, found, vocabulary)

    @classmethod
    def generated(
        cls,
        logits: torch.Tensor,
        labels: torch.Tensor,
        classes: Sequence[str],
        tokenizer: object,
        *,
        candidates: int = 100,
        count: int = 1,
        letters: bool = True,
        special: Mapping[str, str] | None = None,
    ) -> list[Self]:
        """`count` verbalizers of one word a class, the best first: the model's own words for rows of each class, re-ranked by the
        share of all rows that they classify (LM-BFF, Gao et al. 2021, arXiv:2012.15723).

        logits f[N, V] at the masks of labelled rows, labels i64[N]. candidates: words of each class of the highest mean
        log-probability over its rows; letters: of tokens of two letters or more alone.
        """
        vocabulary = Vocabulary.of(tokenizer, special)
        allowed = vocabulary.of_letters if letters else None
        found = generated_words(logits, labels, len(classes), candidates, count, allowed)
        return [cls._of_ids(classes, [[index] for index in chosen], vocabulary) for chosen, _ in found]

    @classmethod
    def _of_ids(cls, classes: Sequence[str], found: Sequence[Sequence[int]], vocabulary: Vocabulary) -> Self:
        """Words of one id each."""
        ids = tuple(tuple((index,) for index in row) for row in found)
        shown = tuple(tuple(vocabulary.token(index) for index in row) for row in found)
        return cls.__new__(cls)._set(tuple(classes), shown, WordTable(ids), "mean", None)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        tokenizer: object,
        classes: Sequence[str] | None = None,
        choice: int = 0,
        longest: int | None = None,
        **options: Any,
    ) -> Self:
        """Label words from a JSON file, a dict or a list of dicts; or from a text file, for each class a line of words between
        commas, several verbalizers between empty lines. The classes are numbered in the order of `classes`, by default that of
        the JSON. longest: as of `knowledgeable`, which drops words then. Raises InputError for a file that cannot be read, and
        for other classes than those."""
        words = chosen(_groups(Path(path), classes), choice, path, "verbalizers")
        ordered = words if classes is None else _in_order(words, classes, Path(path))
        if longest is not None:
            return cls.knowledgeable(ordered, tokenizer, longest=longest, **options)
        return cls(ordered, tokenizer, **options)

    def as_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        prior = None
        if self.prior is not None:
            prior = [row[: len(words)] for row, words in zip(self.prior.tolist(), self.table.ids)]
        return {
            "kind": self.kind, "classes": list(self.classes), "label_words": [list(words) for words in self.label_words],
            "ids": [[list(word) for word in words] for words in self.table.ids], "tokens": self.table.tokens,
            "words": self.words, "prior": prior, "shares": None if self.shares is None else self.shares.tolist(),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The verbalizer of `as_json`."""
        ids = ids_of(data["ids"])
        shown = tuple(tuple(map(str, words)) for words in data["label_words"])
        classes, prior = tuple(data["classes"]), None
        if [len(words) for words in ids] != [len(words) for words in shown] or len(ids) != len(classes):
            raise ValueError("words and ids differ in number")
        table = WordTable(ids, str(data["tokens"]))
        if data["prior"] is not None:
            prior = torch.zeros(table.words.shape)
            for index, (row, words) in enumerate(zip(data["prior"], ids, strict=True)):
                if len(row) != len(words):
                    raise ValueError("a prior is not of its words")
                prior[index, : len(row)] = torch.tensor(row, dtype=torch.float32)
        shares = None
        if data.get("shares") is not None:  # earlier versions had none
            shares = torch.tensor(data["shares"], dtype=torch.float32)
            if shares.shape != table.words.shape:
                raise ValueError("shares are not of the words")
        return cls.__new__(cls)._set(classes, shown, table, str(data["words"]), prior, shares)

    def __repr__(self) -> str:
        words = {name: list(given) for name, given in zip(self.classes, self.label_words)}
        return f"Verbalizer({words!r})"


def _normalised(scores: torch.Tensor) -> torch.Tensor:
    """Scores of words f[B, C, W] as log-probabilities over all words of all classes."""
    return torch.log_softmax(scores.flatten(1), -1).reshape(scores.shape)


def _mean_logits(logits: torch.Tensor) -> torch.Tensor:
    """f[V] or f[N, V] -> f[V]."""
    if logits.dim() not in (1, 2) or not logits.numel():
        raise InputError(f"the logits have shape {list(logits.shape)}: give [V], or [N, V]")
    return logits.detach().float().reshape(-1, logits.shape[-1]).mean(0).cpu()


def _groups(path: Path, classes: Sequence[str] | None) -> list[Any]:
    """The label words of every verbalizer in a file, by class; those of JSON are not checked yet."""
    text = small_text(path, LARGEST_FILE, "label words")
    if path.suffix in (".json", ".jsonl"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"cannot read label words from {path}: {error}") from error
        return found if isinstance(found, list) else [found]
    if classes is None:
        raise InputError(f"{path} names no classes: give classes=[...] in the order of its lines")
    lines = [line.strip() for line in text.splitlines()]
    blocks = [block.split("\n") for block in re.split("\n\n+", "\n".join(lines).strip()) if block]
    for block in blocks:
        if len(block) != len(classes):
            raise InputError(
                f"{path} has a verbalizer of {len(block)} lines, and there are {len(classes)} classes"
            )
    return [
        {name: [word.strip() for word in line.split(",")] for name, line in zip(classes, block)}
        for block in blocks
    ]


def _in_order(words: Any, classes: Sequence[str], path: Path) -> dict[str, Any]:
    """Label words by class, in the order that `classes` names."""
    if not isinstance(words, Mapping) or set(words) != set(classes):
        given = ", ".join(map(str, words)) if isinstance(words, Mapping) else f"a {type(words).__name__}"
        raise InputError(f"{path} has words of {given}, and classes= names {', '.join(map(str, classes))}")
    return {name: words[name] for name in classes}
