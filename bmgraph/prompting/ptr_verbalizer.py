"""PTRVerbalizer: classes by one word at each of several masks (PTR, Han et al. 2021, arXiv:2105.11259)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch

from bmgraph.errors import InputError
from bmgraph.prompting.class_scores import ClassScores, checked_classes
from bmgraph.prompting.vocabulary import Vocabulary
from bmgraph.prompting.word_table import (
    WordIds,
    WordTable,
    check_distinct,
    ids_by_class,
    ids_of,
    read_ids,
    words_by_class,
)


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
        by_class = words_by_class(label_words)
        ids = ids_by_class(by_class, Vocabulary.of(tokenizer, special), prefix)
        self._set(tuple(by_class), ids, tokens)

    def _set(self, classes: tuple[str, ...], ids: WordIds, tokens: str) -> Self:
        self.classes, self.ids, self.tokens = checked_classes(classes), ids, tokens
        numbers = {len(words) for words in ids}
        if len(numbers) != 1:
            raise InputError(
                f"classes have {' or '.join(map(str, sorted(numbers)))} words: give one for each mask"
            )
        (self.masks,) = numbers
        self._masks = [_words_at(ids, mask, tokens) for mask in range(self.masks)]
        check_distinct(read_ids(ids, tokens), self.classes, tokens)
        return self

    def scores(self, values: torch.Tensor) -> torch.Tensor:
        """logits f[B, M, V] -> log-probabilities of classes f[B, C]."""
        return self._of_classes(self._word_logits(values))

    def trained_scores(self, values: torch.Tensor) -> torch.Tensor:
        """With the mean of the log-probabilities of the class's words at their masks."""
        logits = self._word_logits(values)
        own = self._at_classes([torch.log_softmax(found, -1) for found in logits])
        return self._of_classes(logits) + own.mean(0)

    def _word_logits(self, values: torch.Tensor) -> list[torch.Tensor]:
        """logits f[B, M, V] -> for each mask those of the different words there, f[B, W]."""
        return [table.word_logits(values[:, mask])[..., 0] for mask, (table, _) in enumerate(self._masks)]

    def _at_classes(self, words: Sequence[torch.Tensor]) -> torch.Tensor:
        """For each mask f[B, W] of its words -> f[M, B, C] of those of classes."""
        return torch.stack(
            [found.index_select(-1, own.to(found.device)) for found, (_, own) in zip(words, self._masks)]
        )

    def _of_classes(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.log_softmax(self._at_classes(logits).sum(0), -1)

    def as_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        ids = [[list(word) for word in words] for words in self.ids]
        return {"kind": self.kind, "classes": list(self.classes), "ids": ids, "tokens": self.tokens}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The verbalizer of `as_json`."""
        ids, classes = ids_of(data["ids"]), tuple(data["classes"])
        if len(ids) != len(classes):
            raise ValueError("classes and words differ in number")
        return cls.__new__(cls)._set(classes, ids, str(data["tokens"]))


def _words_at(ids: WordIds, mask: int, tokens: str) -> tuple[WordTable, torch.Tensor]:
    """The different words at a mask, and which of them each class has, i64[C]."""
    own = [words[mask] for words in ids]
    words = list(dict.fromkeys(own))
    table = WordTable(tuple((word,) for word in words), tokens)
    return table, torch.tensor([words.index(word) for word in own])
