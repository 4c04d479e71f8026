"""Measures of classification: accuracy, and F1 of each class and over all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bmgraph.errors import InputError


@dataclass(frozen=True)
class Measures:
    """accuracy: the share of right classes, which is the micro-averaged F1 too. macro_f1: the mean of `f1` over classes that occur
    in what is expected or found; f1 is 2 * right / (expected + found)."""

    accuracy: float
    macro_f1: float
    f1: dict[str, float]

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
        right = [one for one, other in zip(found, expected) if one == other]
        f1 = {
            name: 2 * right.count(name) / (list(found).count(name) + list(expected).count(name))
            for name in sorted({*found, *expected})
        }
        return Measures(len(right) / len(found), sum(f1.values()) / len(f1), f1)
