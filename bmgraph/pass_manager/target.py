"""Target: what a backend can run, and runs fast; passes read it as `context.target`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bmgraph.errors import InputError
from bmgraph.ir.pass_record import VERSION

ROW = 0
"""The size of a block that is a whole row."""


@dataclass(frozen=True)
class Target:
    """What quantised programs must look like for a backend.

    activation_modes: how activations may be scaled ("static", "dynamic", "none" for weights only), best first; "blocks" where
    a product with codes of blocks rounds the blocks of its input to 8 bits.
    symmetric: quantised activations are int8 around 0; otherwise uint8 with a zero point.
    weight_scales: the granularity of weight scales ("channel": one for each output; "block": one for each block of inputs of
    an output). block_bits: the sizes of codes that may have scales of blocks; expert_bits: those of experts.
    positive_scales: these must be positive. zero_points: such codes may have zero points.
    expert_blocks: sizes of the blocks of a row by which a kernel for experts scales its input, largest first; ROW: a row is
    one block; empty where it is scaled like any other activation.
    smooth: static activations are smoothed unless a pass is asked not to.
    attention: with static activations, queries and keys are rounded to s8 too unless a pass is asked not to.
    float_codes: products multiply codes that are floating-point numbers of 8 bits (e4m3).
    neurons: feed-forwards to which neurons are added are filled up to a multiple of it.
    former: what the target was before, oldest first: histories say for which version a pass ran, so that who changes a row
    keeps the former one here.
    """

    name: str
    activation_modes: tuple[str, ...] = ("static", "dynamic", "none")
    symmetric: bool = False
    weight_scales: tuple[str, ...] = ("channel",)
    block_bits: tuple[int, ...] = (4, 8)
    expert_bits: tuple[int, ...] = ()
    positive_scales: bool = False
    zero_points: bool = True
    expert_blocks: tuple[int, ...] = (256, 128, 64, 32, 16)
    smooth: bool = False
    attention: bool = False
    float_codes: bool = False
    neurons: int = 1
    former: tuple[Target, ...] = ()

    @property
    def text(self) -> str:
        """What histories call it: its name, and its version unless that is the first."""
        return self.name + (f"{VERSION}{len(self.former) + 1}" if self.former else "")

    def at(self, version: str) -> Target:
        """What it was at a version, "1" for the first; raises InputError for one that is not known."""
        versions = {str(number): found for number, found in enumerate((*self.former, self), 1)}
        if version not in versions:
            raise InputError(
                f"target {self.name!r} has no version {version!r}: this bmgraph knows 1 to {len(versions)}, and a newer one "
                "may have written this"
            )
        return versions[version]


FIRST = Target("torch", weight_scales=("channel", "block"), block_bits=(2, 3, 4, 8))
"""The first version of torch's target, where experts had no codes of blocks."""

TORCH = replace(FIRST, expert_bits=FIRST.block_bits, former=(FIRST,))
"""No lowering: the program runs on torch."""
