"""Biases that are added to linears without one (BitFit): `total = add(linear(x, W), shift)` with shift [out].

Biases that a model has train themselves (`Program.trained_whole`); Ben Zaken et al. 2022 (arXiv:2106.10199).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from bmgraph.deltas.delta_calls import DeltaCalls
from bmgraph.deltas.family import Change, Part, Saved
from bmgraph.deltas.linear_family import LinearFamily
from bmgraph.deltas.module_matching import Sizes
from bmgraph.deltas.plain_format import plain_loaded, plain_saved
from bmgraph.deltas.row_stacks import axes_of, row_vector, stacked_entries
from bmgraph.deltas.weighted_sum import Combination, Weighted, sum_of_tensors
from bmgraph.ir.node_role import delta_role
from bmgraph.ir.program import Program

aten = torch.ops.aten

SHIFT = "shift"


class BitFitFamily(LinearFamily):
    """A bias [out] beside a linear."""

    name = "bitfit"
    roles = (delta_role("bitfit"),)
    peft_type = "BITFIT"
    adds = True
    keys = (SHIFT,)
    axes = {SHIFT: 1}

    def build(
        self, call: DeltaCalls, tensors: Mapping[str, fx.Node], change: Change, options: Mapping[str, Any]
    ) -> fx.Node:
        """Add the bias."""
        return call.end(aten.add.Tensor, call.linear, tensors[SHIFT])

    def sizes(self, change: Change) -> Sizes:
        """As many outputs."""
        return change.tensors[SHIFT].shape[0], None

    def describe(self, change: Change) -> str:
        """A bias."""
        return "a bias"

    def folded(
        self, change: Change, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same weight, and the bias, or the sum of both."""
        shift = change.tensors[SHIFT]
        return weight, shift if bias is None else bias + shift

    def stacked(self, changes: Mapping[int, Change], count: int) -> Change:
        """Shifts [count + 1, out], of zeros for no delta."""
        return Change(stacked_entries({number: change.tensors for number, change in changes.items()}, count))

    def build_rows(self, call: DeltaCalls, x: fx.Node, chosen: Mapping[str, fx.Node]) -> fx.Node:
        """Add the bias of each row."""
        return call.end(aten.add.Tensor, call.linear, row_vector(call, chosen[SHIFT], axes_of(x)))

    def summed(self, changes: Weighted, how: Combination, rank: int | None, module: str) -> Change:
        """The weighted sum of the added biases, which is exact."""
        return sum_of_tensors(changes)

    def saved(self, program: Program) -> Saved | None:
        """One tensor a linear; PEFT has no such family."""
        return plain_saved(self, program)

    def loaded(self, path: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> Part:
        """Read what `saved` wrote."""
        return plain_loaded(self, path, config, tensors)
