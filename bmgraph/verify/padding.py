"""Which input of a program marks padding, and which outputs have positions to ignore where it does."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bmgraph.analysis.attention_mask import read_mask
from bmgraph.analysis.structure.value_origins import walk
from bmgraph.ir.program import Program

Batch = Mapping[str, torch.Tensor]


def padding_mask(program: Program, batch: Batch) -> str | None:
    """The name of the input [batch, sequence] whose ones mark real positions; None if there is none.

    A boolean mask may as well mark the padding (torch's key_padding_mask): it counts where an attention of the program
    hides the keys at its zeros.
    """
    for spec in program.inputs:
        value = batch.get(spec.name)
        if value is None or "mask" not in spec.name or value.dim() != 2 or value.is_floating_point():
            continue
        if _is_binary(value) and (value.dtype != torch.bool or _zeros_hide(program, spec.name)):
            return spec.name
    return None


def _zeros_hide(program: Program, name: str) -> bool:
    masks = {core.mask for core in walk(program.graph).cores if core.mask is not None}
    return any((read := read_mask(program, mask)) is not None and read.padding == name for mask in masks)


def padded_outputs(program: Program, mask: str | None) -> frozenset[str]:
    """The outputs [batch, sequence, ...] whose first two sizes are those of the input `mask`, for all batches.

    Sizes that are only equal in a batch (as many classes as positions) do not count, nor does a fixed length, which cannot
    be told from any other number.
    """
    sizes = next((spec.shape for spec in program.inputs if spec.name == mask), ())
    if len(sizes) != 2 or not isinstance(sizes[1], str) or not (isinstance(sizes[0], str) or sizes[0] == 1):
        return frozenset()
    return frozenset(spec.name for spec in program.outputs if spec.shape[:2] == sizes)


def _is_binary(value: torch.Tensor) -> bool:
    return bool(((value == 0) | (value == 1)).all())
