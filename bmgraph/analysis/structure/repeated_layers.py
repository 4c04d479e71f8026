"""Finds repeated layers: a period in the sequence of site uses."""

from __future__ import annotations

from dataclasses import dataclass

from bmgraph.analysis.structure.sites import Layer, Stack, Use


@dataclass(frozen=True)
class SiteUse:
    """One use of a site; `signature` is equal for sites of the same kind, role and sizes."""

    use: Use
    name: str
    signature: tuple[object, ...]
    is_product: bool
    """Whether it multiplies by a weight; a layer has at least one such use."""


def find_stacks(uses: list[SiteUse]) -> list[Stack]:
    """Scan from the left; at each position take the repetition that covers the most uses.

    Time is about n * p for n uses in layers of p uses.
    """
    numbers: dict[tuple[object, ...], int] = {}
    codes = [numbers.setdefault(use.signature, len(numbers)) for use in uses]
    following = _next_equal(codes)
    stacks: list[Stack] = []
    start = 0
    while start < len(codes):
        period, length = _longest(codes, following, uses, start)
        if not period:
            start += 1
            continue
        start = _align(uses, start, period, length)
        count = length // period
        stacks.append(_stack(uses, start, period, count))
        start += period * count
    return stacks


def _next_equal(codes: list[int]) -> list[int]:
    """For each position the next position with the same code, or -1."""
    following = [-1] * len(codes)
    last: dict[int, int] = {}
    for position in range(len(codes) - 1, -1, -1):
        following[position] = last.get(codes[position], -1)
        last[codes[position]] = position
    return following


def _longest(codes: list[int], following: list[int], uses: list[SiteUse], start: int) -> tuple[int, int]:
    """(period, uses covered from `start`) of the repetition that covers the most; (0, 0) if there is none."""
    best = (0, 0)
    position = following[start]
    while position != -1:
        period = position - start
        if 2 * period > len(codes) - start and best[0]:
            break
        run = 0
        while start + period + run < len(codes) and codes[start + run] == codes[start + period + run]:
            run += 1
        covered = run + period
        whole = covered - covered % period
        products = any(use.is_product for use in uses[start : start + period])
        if run >= period and products and whole > best[1] - best[1] % max(best[0], 1):
            best = (period, covered)
            if covered > 2 * period and run > len(codes) // 2:
                break
        position = following[position]
    return best


def _align(uses: list[SiteUse], start: int, period: int, length: int) -> int:
    """The start of the first layer: of the shifts that keep the number of layers, the one that best matches modules."""
    count = length // period

    def depth(shift: int) -> int:
        begins = range(start + shift, start + shift + count * period, period)
        return sum(len(_shared([use.name for use in uses[begin : begin + period]])) for begin in begins)

    return start + max(range(length % period + 1), key=lambda shift: (depth(shift), -shift))


def _shared(names: list[str]) -> list[str]:
    """The module path that all names share, as a list of components."""
    paths = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for level in zip(*paths):
        if len(set(level)) != 1:
            break
        shared.append(level[0])
    return shared


def _stack(uses: list[SiteUse], start: int, period: int, count: int) -> Stack:
    """The layers of a repetition; those with the same sites are one layer that runs several times."""
    layers: dict[tuple[str, ...], Layer] = {}
    for begin in range(start, start + period * count, period):
        block = uses[begin : begin + period]
        sites = tuple(use.name for use in block)
        path = ".".join(_shared([use.name for use in block if use.is_product]))
        runs = layers[sites].runs if sites in layers else ()
        runs = (*runs, tuple(use.use for use in block))
        layers[sites] = Layer(path, sites, len(runs), runs)
    return Stack(tuple(layers.values()))
