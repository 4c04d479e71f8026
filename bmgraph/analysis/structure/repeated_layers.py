"""Repeated layers: equal runs of sites, one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from bmgraph.analysis.structure.sites import Layer, Stack


@dataclass(frozen=True)
class Step:
    """One use of a site, in order; `likeness` is equal for sites of the same kind, role and sizes."""

    name: str
    likeness: tuple[object, ...]
    weighs: bool
    """Whether it is a product: a layer has at least one."""


def find_stacks(steps: list[Step]) -> list[Stack]:
    """Read from the left: of the repetitions that start here, take the one that covers most.

    For n steps in layers of p steps the cost is about n * p.
    """
    numbers: dict[tuple[object, ...], int] = {}
    codes = [numbers.setdefault(step.likeness, len(numbers)) for step in steps]
    following = _next_equal(codes)
    stacks: list[Stack] = []
    start = 0
    while start < len(codes):
        period, length = _longest(codes, following, steps, start)
        if not period:
            start += 1
            continue
        start = _align(steps, start, period, length)
        count = length // period
        stacks.append(_stack(steps, start, period, count))
        start += period * count
    return stacks


def _next_equal(codes: list[int]) -> list[int]:
    """For every place the next one with the same code; -1 for none."""
    following = [-1] * len(codes)
    last: dict[int, int] = {}
    for place in range(len(codes) - 1, -1, -1):
        following[place] = last.get(codes[place], -1)
        last[codes[place]] = place
    return following


def _longest(codes: list[int], following: list[int], steps: list[Step], start: int) -> tuple[int, int]:
    """(period, steps covered from `start`) of the repetition that covers most; (0, 0) for none."""
    best = (0, 0)
    place = following[start]
    while place != -1:
        period = place - start
        if 2 * period > len(codes) - start and best[0]:
            break
        run = 0
        while start + period + run < len(codes) and codes[start + run] == codes[start + period + run]:
            run += 1
        covered = run + period
        whole = covered - covered % period
        products = any(step.weighs for step in steps[start : start + period])
        if run >= period and products and whole > best[1] - best[1] % max(best[0], 1):
            best = (period, covered)
            if covered > 2 * period and run > len(codes) // 2:
                break
        place = following[place]
    return best


def _align(steps: list[Step], start: int, period: int, length: int) -> int:
    """Where the layers begin: of the shifts that keep their number, the one whose layers are modules of their own."""
    count = length // period

    def depth(shift: int) -> int:
        begins = range(start + shift, start + shift + count * period, period)
        return sum(len(_shared([step.name for step in steps[begin : begin + period]])) for begin in begins)

    return start + max(range(length % period + 1), key=lambda shift: (depth(shift), -shift))


def _shared(names: list[str]) -> list[str]:
    """The module path that all names begin with."""
    paths = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for level in zip(*paths):
        if len(set(level)) != 1:
            break
        shared.append(level[0])
    return shared


def _stack(steps: list[Step], start: int, period: int, count: int) -> Stack:
    layers: dict[tuple[str, ...], Layer] = {}
    for begin in range(start, start + period * count, period):
        block = steps[begin : begin + period]
        sites = tuple(step.name for step in block)
        path = ".".join(_shared([step.name for step in block if step.weighs]))
        times = layers[sites].times if sites in layers else 0
        layers[sites] = Layer(path, sites, times + 1)
    return Stack(tuple(layers.values()))
