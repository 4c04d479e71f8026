"""Minimum, optimum and maximum of every dynamic size: requested, or derived from the example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bmgraph.errors import InputError
from bmgraph.ir.cache_spec import CacheLayout
from bmgraph.ir.program import Program
from bmgraph.ir.symbolic_dim import names_of, size_of
from bmgraph.ir.tensor_spec import Dim, Range
from bmgraph.utils.did_you_mean import did_you_mean

GROWTH = 8
"""Default maximum of a dynamic size, as a multiple of the example's size."""


@dataclass(frozen=True)
class SizeProfile:
    """The range of one dynamic size, and the size that kernels are tuned for."""

    min: int
    opt: int
    max: int


def choose_profile(
    program: Program, requested: Sequence[tuple[str, int, int, int]]
) -> dict[str, SizeProfile]:
    """Profiles of all dynamic input sizes by name; `requested` holds (name, min, opt, max), the rest get defaults.

    Raises InputError for an unknown name, for sizes that are not min <= opt <= max, and outside the program's range.
    """
    example = _example_sizes(program)
    chosen = {name: SizeProfile(low, opt, high) for name, low, opt, high in requested}
    for name, sizes in chosen.items():
        if name not in example:
            hint = did_you_mean(name, example)
            raise InputError(
                f"sizes: no input has a dynamic size {name!r} (dynamic: {', '.join(example) or 'none'}){hint}"
            )
        _check(name, sizes, program.ranges.get(name, Range()))
    return {
        name: chosen.get(name) or _default(size, program.ranges.get(name, Range()))
        for name, size in example.items()
    }


def decoding_profile(
    program: Program,
    cache: CacheLayout,
    sizes: Mapping[str, SizeProfile],
    requested: Sequence[tuple[str, int, int, int]],
) -> tuple[dict[str, SizeProfile], int]:
    """Sizes of an engine that generates, and how many positions its cache has room for: new positions are best one at a time, and cached
    and new ones together are what the program allows, or the sum of both maxima."""
    spec = cache.spec(program)
    new, total = str(spec.tokens.shape[1]), str(spec.slots[0].present.shape[spec.slots[0].axis])
    past = str(spec.slots[0].past.shape[spec.slots[0].axis])
    if past not in sizes or new not in sizes:
        raise InputError(
            f"the cache {spec.slots[0].past} has no dynamic number of positions to generate with"
        )
    found, asked = dict(sizes), {name for name, *_ in requested}
    limit = program.ranges.get(total, Range()).high
    if new not in asked:
        found[new] = SizeProfile(found[new].min, 1, found[new].max if limit is None else limit)
    if past not in asked:
        most = found[past].max if limit is None else limit - 1
        found[past] = SizeProfile(0, max(1, most // 2), most)
    room = found[past].max + found[new].max if limit is None else min(limit, found[past].max + found[new].max)
    found[total] = SizeProfile(
        max(1, found[past].min + found[new].min), min(room, found[past].opt + found[new].opt), room
    )
    return found, room


def _check(name: str, sizes: SizeProfile, bounds: Range) -> None:
    if not 0 <= sizes.min <= sizes.opt <= sizes.max or sizes.max < 1:
        raise InputError(
            f"sizes of {name!r} are {sizes.min}, {sizes.opt}, {sizes.max}: give min <= opt <= max"
        )
    if sizes.min < bounds.low or (bounds.high is not None and sizes.max > bounds.high):
        limit = "any" if bounds.high is None else bounds.high
        raise InputError(
            f"sizes of {name!r} are {sizes.min} to {sizes.max}: this program accepts {bounds.low} to {limit}"
        )


def _default(size: int, bounds: Range) -> SizeProfile:
    high = size * GROWTH
    return SizeProfile(bounds.low, size, high if bounds.high is None else max(size, min(high, bounds.high)))


def _example_sizes(program: Program) -> dict[str, int]:
    """Dynamic sizes by name, as in the example; those that it does not determine are 1 or their minimum if larger."""
    sizes: dict[str, int] = {}
    for spec in program.inputs:
        shape = program.example[spec.name].shape if spec.name in program.example else [None] * len(spec.shape)
        for dim, size in zip(spec.shape, shape):
            for name in names_of(dim) or ():
                if size is not None and name == dim:
                    sizes[name] = int(size)
                else:
                    sizes.setdefault(name, max(1, program.ranges.get(name, Range()).low))
    return sizes


def evaluate_dim(dim: Dim, sizes: Mapping[str, int]) -> int:
    """Evaluate a dimension such as `past + sequence`, given the sizes that it names.

    Raises InputError for operators other than +, - and *.
    """
    size = size_of(dim, sizes)
    if size is None:
        raise InputError(f"input dimension {dim!r} is not supported: only +, - and * are")
    return size
