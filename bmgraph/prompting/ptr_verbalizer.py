"""PTRVerbalizer: classes by one word at each of several masks (PTR, Han et al. 2021, arXiv:2105.11259)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch

from bmgraph.errors import InputError
from bmgraph.prompting.class_scores import ClassScores, checked_classes
from bmgraph.prompting.verbalizer import ids_of
from bmgraph.prompting.vocabulary import Vocabulary
from bmgraph.prompting.word_table import WordTable, check_distinct, word_ids, words_by_class


class PTRVerbalizer(ClassScores):
    """Each class by a word at each mask: its score is the sum of their logits, as log-probabilities over classes.

    label_words: class -> one word for each mask of the template. Training also asks each mask for its own word, by the mean of
    the masks' log-probabilities over the words that stand there. tokens, prefix, special: as in `Verbalizer`.

    Raises InputError as `Verbalizer` does, and where classes have different numbers of words.
    """

    kind: ClassVar[str] = "ptr"

    def __init__(
        self,
        label_words: Mapping[str, Sequence[str]],
        tokenizer: object,
        *,
        prefix: str = " ",
        tokens: str = "first",
        special: Mapping[str, str] | None = None,
    ) -> None:
        by_class, vocabulary = words_by_class(label_words), Vocabulary.of(tokenizer, special)
        ids = tuple(
            tuple(word_ids(word, vocabulary, prefix, f"class {name!r}") for word in given)
            for name, given in by_class.items()
        )
        self._set(tuple(by_class), ids, tokens)

    def _set(
        self, classes: tuple[str, ...], ids: tuple[tuple[tuple[int, ...], ...], ...], tokens: str
    ) -> None:
        self.classes, self.ids, self.tokens = checked_classes(classes), ids, tokens
        numbers = {len(words) for words in ids}
        if len(numbers) != 1:
            raise InputError(
                f"classes have {' or '.join(map(str, sorted(numbers)))} words: give one for each mask"
            )
        (self.masks,) = numbers
        self._masks = [_words_at(ids, mask, tokens) for mask in range(self.masks)]
        read = [tuple(word[:1] if tokens == "first" else word for word in words) for words in ids]
        if len(set(read)) < len(read):
            check_distinct(WordTable(ids, tokens), self.classes)
            raise InputError("two classes have the same words at all masks: no model can tell them apart")

    def scores(self, values: torch.Tensor) -> torch.Tensor:
        """logits f[B, M, V] -> log-probabilities of classes f[B, C]."""
        parts = [
            table.word_logits(values[:, mask])[..., 0].index_select(-1, words.to(values.device))
            for mask, (table, words) in enumerate(self._masks)
        ]
        return torch.log_softmax(torch.stack(parts).sum(0), -1)

    def trained_scores(self, values: torch.Tensor) -> torch.Tensor:
        """With the mean of the log-probabilities of the class's words at their masks."""
        parts = [
            torch.log_softmax(table.word_logits(values[:, mask])[..., 0], -1).index_select(
                -1, words.to(values.device)
            )
            for mask, (table, words) in enumerate(self._masks)
        ]
        return self.scores(values) + torch.stack(parts).mean(0)

    def as_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        ids = [[list(word) for word in words] for words in self.ids]
        return {"kind": self.kind, "classes": list(self.classes), "ids": ids, "tokens": self.tokens}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The verbalizer of `as_json`."""
        found = cls.__new__(cls)
        ids, classes = ids_of(data["ids"]), tuple(data["classes"])
        if len(ids) != len(classes):
            raise ValueError("classes and words differ in number")
        found._set(classes, ids, str(data["tokens"]))
        return found


def _words_at(
    ids: tuple[tuple[tuple[int, ...], ...], ...], mask: int, tokens: str
) -> tuple[WordTable, torch.Tensor]:
    """The different words at a mask, and which of them each class has, i64[C]."""
    own = [words[mask] for words in ids]
    words = list(dict.fromkeys(own))
    table = WordTable(tuple((word,) for word in words), tokens)
    return table, torch.tensor([words.index(word) for word in own])
