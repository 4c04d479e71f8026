"""Which tokens of the pieces of a text stay where the text is longer than the model takes."""

from __future__ import annotations

from collections.abc import Sequence

from bmgraph.errors import InputError

METHODS = ("tail", "head", "balanced", "never")
Kept = tuple[int, int]
"""The first token of a piece that stays, and the one behind the last."""


def check_method(method: str) -> None:
    """Raise InputError for an unknown way to truncate."""
    if method not in METHODS:
        raise InputError(f"truncate={method!r}: choose one of {', '.join(METHODS)}")


def kept_tokens(lengths: Sequence[int], shortenable: Sequence[bool], excess: int, method: str) -> list[Kept]:
    """Cut `excess` tokens from the pieces that are shortenable, which must have as many.

    "tail" cuts from the end of the last pieces, "head" from the beginning of the first, "balanced" from the end of each in
    proportion to its length, by largest remainders.
    """
    cuts = [0] * len(lengths)
    if excess > 0 and method == "balanced":
        cuts = _shares(lengths, shortenable, excess)
    elif excess > 0:
        order = range(len(lengths)) if method == "head" else reversed(range(len(lengths)))
        for index in order:
            if shortenable[index]:
                cuts[index] = min(lengths[index], excess - sum(cuts))
    if method == "head":
        return [(cut, length) for cut, length in zip(cuts, lengths)]
    return [(0, length - cut) for cut, length in zip(cuts, lengths)]


def _shares(lengths: Sequence[int], shortenable: Sequence[bool], excess: int) -> list[int]:
    parts = [length if cut else 0 for length, cut in zip(lengths, shortenable)]
    total = sum(parts)
    cuts = [excess * part // total for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda index: (-(excess * parts[index] % total), index))
    for index in by_remainder[: excess - sum(cuts)]:
        cuts[index] += 1
    return cuts
