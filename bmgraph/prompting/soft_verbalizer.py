"""SoftVerbalizer: classes by trained rows of the head, one for each (WARP, Hambardzumyan et al. 2021, arXiv:2101.00121)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch

from bmgraph.errors import InputError
from bmgraph.prompting.class_scores import CLASSES, ClassScores, checked_classes
from bmgraph.prompting.vocabulary import Vocabulary
from bmgraph.prompting.word_table import LARGEST, ids_by_class, words_by_class


class SoftVerbalizer(ClassScores):
    """Scores of classes are what the rows that the pass `ClassRows` trains say at the mask.

    label_words: class -> a word or a list of words, the mean of whose rows of the head each class starts from; or names of classes,
    which start at random. prefix: stands in front of each word. special: see `Template`. `words` are the ids for the pass:
    `ClassRows(task.verbalizer.words)`.

    Raises InputError for fewer than two classes, and a word outside the vocabulary.
    """

    kind: ClassVar[str] = "soft"
    reads: ClassVar[str] = CLASSES

    def __init__(
        self,
        label_words: Mapping[str, str | Sequence[str]] | Sequence[str],
        tokenizer: object = None,
        *,
        prefix: str = " ",
        special: Mapping[str, str] | None = None,
    ) -> None:
        if isinstance(label_words, Mapping):
            by_class = words_by_class(label_words)
            ids = ids_by_class(by_class, Vocabulary.of(tokenizer, special), prefix)
            self._set(
                tuple(by_class), tuple(tuple(index for word in words for index in word) for words in ids)
            )
        else:
            classes = tuple(label_words)
            self._set(classes, ((),) * len(classes))

    def _set(self, classes: Sequence[str], words: tuple[tuple[int, ...], ...]) -> Self:
        self.classes, self.words = checked_classes(classes), words
        if len(words) != len(self.classes) or sum(map(len, words)) > LARGEST:
            raise InputError(f"{len(words)} classes have words, and {len(self.classes)} names")
        return self

    def scores(self, values: torch.Tensor) -> torch.Tensor:
        """What the rows say at the mask f[B, 1, C] -> f[B, C]. Raises InputError for another number of classes."""
        if values.shape[-1] != len(self.classes):
            raise InputError(
                f"the verbalizer has {len(self.classes)} classes, and the output {values.shape[-1]}: run the pass ClassRows(verbalizer.words)"
            )
        return values[:, 0]

    def as_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {"kind": self.kind, "classes": list(self.classes), "words": [list(ids) for ids in self.words]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The verbalizer of `as_json`."""
        words = tuple(tuple(ids) for ids in data["words"])
        if not all(type(index) is int and 0 <= index < 2**31 for ids in words for index in ids):
            raise ValueError("ids of words are whole numbers from 0 on")
        return cls.__new__(cls)._set(tuple(data["classes"]), words)

    def __repr__(self) -> str:
        return f"SoftVerbalizer({list(self.classes)!r})"
