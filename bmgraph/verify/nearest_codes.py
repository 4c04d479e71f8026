"""Whether the codes of blocks of a weight are the nearest ones, at scales that its largest values fill."""

from __future__ import annotations

import torch
from torch import fx

from bmgraph.errors import VerificationError
from bmgraph.ops.block_codes import block_size, unpack_codes, unpack_zeros

SLACK = 1e-2
"""How far beyond half a scale a code may be, in scales, beside the rounding of the scales' own type."""

LEAST_USED = 0.95
"""The share of the codes' range that the largest weight of a channel, or of a block, must use."""


def block_codes_of(node: fx.Node) -> fx.Node | None:
    """The call that makes a weight of codes of blocks, given the node that stands for the weight, which may transpose it."""
    if node.target is torch.ops.aten.t.default and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node if node.target is torch.ops.bmgraph.dequantize_blocks.default else None


def check_block_codes(
    site: str,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    old: torch.Tensor,
    first: int,
    span: float,
) -> None:
    """Raise VerificationError unless packed codes are the nearest to the old weight f[N, K].

    The range of codes has one more below zero than above: a value may be one step beyond it. `first` is the number of the
    first output, `span` the least share of the largest value that codes may span.
    """
    columns, block = old.shape[1], block_size(packed, bits)
    codes = unpack_codes(packed, bits, columns).double()
    steps = old.double() / scale.double().repeat_interleave(block, 1)[:, :columns]
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if zero is not None:
        _check_shifted(
            site,
            codes,
            steps,
            unpack_zeros(zero, bits, packed.shape[1]),
            scale.dtype,
            bits,
            block,
            first,
            span,
        )
        return
    slack = SLACK + highest * torch.finfo(scale.dtype).eps
    error = (codes - steps.clamp(lowest, highest)).abs()
    if bool((error > 0.5 + slack).any()):
        raise VerificationError(
            f"{site}: a code is {float(error.max()):.2f} scales away from its weight, more than half a scale"
        )
    if bool((steps.abs() > -lowest / span + slack).any()):
        raise VerificationError(
            f"{site}: a value is {float(steps.abs().max()):.1f} scales from zero, beyond its codes: its scale is too small"
        )
    filled = torch.nn.functional.pad(steps.abs(), (0, -columns % block)).reshape(len(old), -1, block)
    largest = filled.amax(-1)
    used = torch.where(largest > 0, largest, float(highest))
    if float(used.min()) < LEAST_USED * highest:
        row, place = divmod(int(used.argmin()), used.shape[1])
        raise VerificationError(
            f"{site}: block {place} of output {first + row} uses codes up to {float(used.min()):.1f} of {highest}: its scale is "
            "too large"
        )


def _check_shifted(
    site: str,
    codes: torch.Tensor,
    steps: torch.Tensor,
    zero: torch.Tensor,
    dtype: torch.dtype,
    bits: int,
    block: int,
    first: int,
    span: float,
) -> None:
    """The same for codes f64[N, K] of old weights, in `steps` of their scales, around zero points i8[N, B]; scales are of a `dtype`.

    A grid covers the values of its block and 0. Its zero point, a whole number, may leave out half a step, and one more where it
    was searched.
    """
    columns, count = codes.shape[1], 2**bits - 1
    shift = zero.double().repeat_interleave(block, 1)[:, :columns]
    lowest, highest = -(2 ** (bits - 1)) - shift, 2 ** (bits - 1) - 1 - shift
    slack = SLACK + count * torch.finfo(dtype).eps
    inside = torch.minimum(torch.maximum(steps, lowest), highest)
    error = (codes - shift - inside).abs()
    if bool((error > 0.5 + slack).any()):
        raise VerificationError(
            f"{site}: a code is {float(error.max()):.2f} scales away from its weight, more than half a scale"
        )
    beyond, allowed = (steps - inside).abs(), 0.5 if span == 1 else count * (1 / span - 1) + 1.5
    if bool((beyond > allowed + slack).any()):
        raise VerificationError(
            f"{site}: a value is {float(beyond.max()):.1f} scales beyond its codes: its scale is too small"
        )
    filled = torch.nn.functional.pad(steps, (0, -columns % block)).reshape(len(steps), -1, block)
    width = filled.amax(-1).clamp(min=0) - filled.amin(-1).clamp(max=0)
    used = torch.where(width > 0, width, float(count))
    if float(used.min()) < LEAST_USED * count:
        row, place = divmod(int(used.argmin()), used.shape[1])
        raise VerificationError(
            f"{site}: block {place} of output {first + row} spans {float(used.min()):.1f} steps of {count}: its scale is too large"
        )
