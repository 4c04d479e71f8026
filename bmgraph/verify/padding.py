"""Which input of a program marks padding, and which outputs have positions to ignore where it does."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from bmgraph.analysis.attention_mask import zeros_hide
from bmgraph.analysis.structure.value_origins import Core, walk
from bmgraph.ir.program import Program, placeholders
from bmgraph.ir.tensor_spec import TensorSpec

CUSTOMARY = ("attention_mask", "mask")
"""What a mask of real positions is called in models without attention, which may pool over them."""

Batch = Mapping[str, torch.Tensor]


def padding_mask(program: Program, batch: Batch) -> str | None:
    """The name of the input [batch, sequence] whose ones mark real positions; None if there is none.

    It is an input of zeros and ones named as a mask, whose zeros hide keys in an attention of the program: one that marks
    the padding itself (torch's key_padding_mask), or tokens to predict, would hide real positions from a comparison.
    """
    for spec in program.inputs:
        value = batch.get(spec.name)
        if value is None or "mask" not in spec.name or value.dim() != 2 or value.is_floating_point():
            continue
        if _is_binary(value) and _marks_real_positions(program, spec):
            return spec.name
    return None


def _marks_real_positions(program: Program, spec: TensorSpec) -> bool:
    """Whether an attention hides keys at an input's zeros; where that cannot be told, whether integers reach its scores."""
    cores = walk(program.graph).cores
    found = {
        zeros_hide(program, mask, spec.name) for mask in {core.mask for core in cores} if mask is not None
    }
    if True in found or spec.dtype == torch.bool:
        return True in found
    if not cores:
        return spec.name in CUSTOMARY  # nothing attends, so that only the name can tell
    source = placeholders(program.graph)[spec.name]
    return None in found or any(_reaches_scores(source, core) for core in cores if core.softmax is not None)


def _reaches_scores(source: fx.Node, core: Core) -> bool:
    """Whether a written-out attention reads an input between its scores and its softmax, other than through the scores."""
    seen: set[fx.Node] = {core.scores} if core.scores is not None else set()
    stack = [core.softmax] if core.softmax is not None else []
    while stack:
        item = stack.pop()
        if item is source:
            return True
        if item not in seen:
            seen.add(item)
            stack.extend(item.all_input_nodes)
    return False


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
