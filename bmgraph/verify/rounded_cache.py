"""What a decoder computes whose KV cache is kept in codes of 8 bits: the reference for engines that keep it so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from bmgraph.ir.cache_spec import CacheLayout
from bmgraph.ir.evaluation import GraphRunner
from bmgraph.ir.input_check import check_inputs
from bmgraph.ir.omitted_inputs import with_fed
from bmgraph.ir.program import Program, output_node

STEPS = 255
"""Steps between the least and the greatest number of a group of codes."""


def with_rounded_cache(program: Program, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs of a program with a KV cache, on torch, whose keys and values are kept in 8 bits.

    Attention reads rounded ones, the new ones too; behind an empty cache it reads the new ones as they are.
    """
    assert program.cache is not None
    layout = program.cache
    given = with_fed(program.feeders(), program.inputs, batch)
    checked = check_inputs(program.inputs, program.ranges, given, program.ignored, layout)
    first = layout.slots[0]
    empty = not checked[first.past].shape[first.axis]
    checked |= {slot.past: rounded(checked[slot.past]) for slot in layout.slots if not empty}
    kept = frozenset() if empty else _appended(program, layout)
    runner = _Rounding(program.graph, {**program.parameters, **program.buffers}, kept)
    with torch.no_grad():
        values = runner.run(*(value.to(program.device) for value in checked.values()))
    outputs = dict(zip((spec.name for spec in program.outputs), values))
    return outputs | {slot.present: rounded(outputs[slot.present]) for slot in layout.slots}


def rounded(value: torch.Tensor) -> torch.Tensor:
    """f[..., d], each row of which is rounded to the nearest of 256 numbers from its least to its greatest."""
    if not value.numel():
        return value
    low, high = value.amin(-1, keepdim=True), value.amax(-1, keepdim=True)
    step = (high - low) / STEPS
    return torch.where(step > 0, low + ((value - low) / step).round() * step, value)


def _appended(program: Program, layout: CacheLayout) -> frozenset[fx.Node]:
    """The nodes of the cache with the new positions appended."""
    returned: Any = output_node(program.graph).args[0]
    presents = {slot.present for slot in layout.slots}
    return frozenset(node for spec, node in zip(program.outputs, returned) if spec.name in presents)


class _Rounding(GraphRunner):
    """Runs a graph, of which some nodes give rounded values."""

    def __init__(
        self, graph: fx.Graph, tensors: Mapping[str, torch.Tensor], nodes: frozenset[fx.Node]
    ) -> None:
        super().__init__(graph, tensors)
        self._rounded = nodes

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node."""
        result = super().run_node(n)
        return rounded(result) if n in self._rounded else result
