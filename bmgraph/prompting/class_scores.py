"""What every verbalizer is: scores of classes from what the model says at the masks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from bmgraph.errors import InputError
from bmgraph.utils.did_you_mean import did_you_mean

LOGITS, HIDDEN, CLASSES = "logits", "hidden", "classes"
"""What a verbalizer reads at the masks: logits over the vocabulary, hidden states, or scores of its classes."""


class ClassScores(ABC):
    """Turns values at the masks into a score of each class; it is plain data, and its arithmetic is torch's.

    `classes` are the names in order, `masks` the number of masks that a template must have. `reads` says whether the values
    are logits over the vocabulary, hidden states, or scores of classes.
    """

    kind: ClassVar[str]
    reads: ClassVar[str] = LOGITS
    classes: tuple[str, ...]
    masks: int = 1

    @abstractmethod
    def scores(self, values: torch.Tensor) -> torch.Tensor:
        """values f[B, M, V] at the masks -> scores f[B, C], of which the largest is the class."""

    def trained_scores(self, values: torch.Tensor) -> torch.Tensor:
        """The scores f[B, C] whose cross-entropy is minimised: the same, unless the method says otherwise."""
        return self.scores(values)

    @abstractmethod
    def as_json(self) -> dict[str, Any]:
        """All of it as plain values."""

    @classmethod
    @abstractmethod
    def from_json(cls, data: Mapping[str, Any]) -> ClassScores:
        """The verbalizer of `as_json`; raises KeyError, TypeError, ValueError or InputError for what is none."""

    def class_index(self, label: object, index: int) -> int:
        """The number of a row's label, given by name or number; raises InputError."""
        if isinstance(label, str) and label in self.classes:
            return self.classes.index(label)
        if type(label) is int and 0 <= label < len(self.classes):
            return label
        raise InputError(
            f"row {index} has the label {label!r}{did_you_mean(label, self.classes)}: give one of {', '.join(self.classes)}, or its "
            "number from 0"
        )


def checked_classes(classes: Sequence[object]) -> tuple[str, ...]:
    """Names of classes; raises InputError for fewer than two, for what is no text, and for one that stands twice."""
    if len(classes) < 2:
        raise InputError(f"the verbalizer has {len(classes)} classes: give two or more")
    for name in classes:
        if not isinstance(name, str) or not name:
            raise InputError(f"the class {name!r} is no name: give a text")
    if len(set(classes)) < len(classes):
        raise InputError(f"a class stands twice among {', '.join(map(str, classes))}")
    return tuple(map(str, classes))
