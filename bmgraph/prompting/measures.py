"""Measures of classification: accuracy, and F1 of each class and over all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bmgraph.errors import InputError


@dataclass(frozen=True)
class Measures:
    """accuracy: the share of right classes. macro_f1: the mean of `f1` over classes that occur in what is expected or found; f1
    is 2 * right / (expected + found)."""

    accuracy: float
    macro_f1: float
    f1: dict[str, float]

    @property
    def micro_f1(self) -> float:
        """F1 of the counts of all classes together; where each row has one class, that is the accuracy."""
        return self.accuracy

    @staticmethod
    def of(found: Sequence[str], expected: Sequence[str]) -> Measures:
        """The measures of classes that were found for rows, beside those that they have.

        Raises InputError where these differ in number, and without rows.

        Example:
            >>> Measures.of(["a", "b", "b"], ["a", "a", "b"]).macro_f1
            0.6666666666666666
        """
        if len(found) != len(expected) or not found:
            raise InputError(
                f"{len(found)} classes were found, and {len(expected)} are expected: give as many, one or more"
            )
        classes, pairs = sorted({*found, *expected}), Counter(zip(expected, found))
        return Measures.of_counts([[pairs[one, other] for other in classes] for one in classes], classes)

    @staticmethod
    def of_counts(counts: Sequence[Sequence[float]], classes: Sequence[str]) -> Measures:
        """The measures of a confusion matrix: `counts[i][j]` rows of class i were given class j."""
        right = {name: row[index] for index, (name, row) in enumerate(zip(classes, counts))}
        both = {
            name: sum(row) + sum(other[index] for other in counts)
            for index, (name, row) in enumerate(zip(classes, counts))
        }
        f1 = {name: 2 * right[name] / both[name] for name in classes if both[name]}
        return Measures(sum(right.values()) / sum(map(sum, counts)), sum(f1.values()) / len(f1), f1)
