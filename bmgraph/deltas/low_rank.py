"""Low-rank deltas (LoRA) on linears: their form in a graph, and their arithmetic.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models". A delta has this form in the graph:

    y      = linear(x, W, b)
    change = mul(linear(linear(dropout(x), A), B), scale)     A [r, in], B [out, r]
    total  = add(y, change)

If only some outputs of a linear change (the queries of a fused q/k/v), `mul(B, rows)` replaces B; rows is bool[out, 1].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.interpreter import reads_no_input
from bmgraph.analysis.weight_sites import Weight
from bmgraph.deltas.delta_calls import DeltaCalls, delta_base, delta_input
from bmgraph.deltas.family import Change, Delta, Part, Saved
from bmgraph.deltas.linear_family import ROWS, LinearFamily, of_no_family
from bmgraph.deltas.low_rank_format import DROPOUT, read_low_rank, saved_low_rank
from bmgraph.deltas.module_matching import Sizes
from bmgraph.deltas.row_stacks import axes_of, row_matrix, stacked_entries
from bmgraph.deltas.weighted_sum import Combination, Weighted, sum_of_factors
from bmgraph.ir.node_role import DELTA, is_delta
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of

aten = torch.ops.aten

A, B, SCALE = "a", "b", "scale"
"""Names of a change's tensors, A [r, in], B [out, r] and perhaps rows bool[out, 1], and of its number."""


class LowRank(LinearFamily):
    """Deltas `scale * B A` of weights. `rows` selects outputs to change; a delta that is found has it within B."""

    name = "lora"
    roles = (DELTA,)
    peft_type = "LORA"
    adds = True
    faster = (B,)
    keys = (A, B, ROWS)
    axes = {A: 2, B: 2, ROWS: 2}
    numbers = (SCALE,)
    rank_axes = {A: 2, B: 1}

    def build(
        self, call: DeltaCalls, tensors: Mapping[str, fx.Node], change: Change, options: Mapping[str, Any]
    ) -> fx.Node:
        """Add `scale * B A x` to the output."""
        x, b = delta_input(call.linear), tensors[B]
        if ROWS in tensors:
            b = call(aten.mul.Tensor, b, tensors[ROWS])
        if options.get(DROPOUT):
            x = call(aten.dropout.default, x, options[DROPOUT], True)
        down = call(aten.linear.default, x, tensors[A])
        up = call(aten.linear.default, down, b)
        return call.end(aten.add.Tensor, call.linear, call(aten.mul.Tensor, up, change.numbers[SCALE]))

    def read(self, total: fx.Node) -> Delta:
        """The delta that ends in a total; raises PassError where it is not `scale * B A x`."""
        change: Any = total.args[1]
        try:
            up, scale = change.args
            down, b = up.args[:2]
            x, a = down.args[:2]
            targets = (change.target, up.target, down.target)
        except (AttributeError, ValueError):  # other calls than these
            raise of_no_family(total, FORM) from None
        expected = (aten.mul.Tensor, aten.linear.default, aten.linear.default)
        if targets != expected or not isinstance(scale, (int, float)) or not _are_parameters(a, b):
            raise of_no_family(total, FORM)
        dropped = traits_of(x).kind is Kind.DROPOUT and is_delta(x)
        return Delta(
            self,
            str(total.meta["site"]),
            delta_base(total),
            total,
            tensors={A: a, B: b},
            numbers={SCALE: float(scale)},
            options={DROPOUT: float(x.args[1]) if dropped else 0.0},
        )

    def sizes(self, change: Change) -> Sizes:
        """Outputs of B, inputs of A."""
        return change.tensors[B].shape[0], change.tensors[A].shape[1]

    def describe(self, change: Change) -> str:
        """Its rank, or the largest of stacked ones."""
        a = change.tensors[A]
        return f"rank {a.shape[0] if a.dim() == 2 else a.shape[2]}"

    def folded(
        self, change: Change, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """W + scale * B A, and the same bias."""
        return weight + change.numbers[SCALE] * (change.tensors[B] @ change.tensors[A]), bias

    def why_not_folded(self, program: Program, delta: Delta, weight: Weight) -> str:
        """A weight whose inputs were copied does not fit A any more."""
        inputs = weight.node.meta["val"].shape[1 - weight.channel_axis]
        expected = delta.tensors[A].meta["val"].shape[-1]
        if inputs == expected:
            return ""
        return f"its weight has {inputs} inputs and the delta {expected}, since SplitOutliers copied channels: merge before it"

    def stacked(self, changes: Mapping[int, Change], count: int) -> Change:
        """A [count + 1, in, r] and B [count + 1, r, out], the scale multiplied into B; zeros for smaller ranks."""
        return Change(
            stacked_entries({number: self.row_entry(item) for number, item in changes.items()}, count)
        )

    def row_entry(self, change: Change) -> Mapping[str, torch.Tensor]:
        """A transposed, and B transposed, times the scale."""
        return {A: change.tensors[A].T, B: (change.tensors[B] * change.numbers[SCALE]).T}

    def summed(self, changes: Weighted, how: Combination, rank: int | None, module: str) -> Change:
        """As PEFT's `add_weighted_adapter`."""
        return sum_of_factors(changes, how, rank, module)

    def build_rows(self, call: DeltaCalls, x: fx.Node, chosen: Mapping[str, fx.Node]) -> fx.Node:
        """Add x A B of each row: two batched matrix products."""
        axes = axes_of(x)
        a, b = (row_matrix(call, chosen[key], axes) for key in (A, B))
        if axes == 2:
            x = call(aten.unsqueeze.default, x, 1)
        change = call(aten.matmul.default, call(aten.matmul.default, x, a), b)
        return call.end(
            aten.add.Tensor, call.linear, call(aten.squeeze.dim, change, 1) if axes == 2 else change
        )

    def saved(self, program: Program) -> Saved | None:
        """PEFT's configuration and factors; several deltas on one module are saved as one, of the sum of their ranks."""
        return saved_low_rank(self, program, self.by_module(program))

    def loaded(self, path: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> Part:
        """Read PEFT's configuration and factors."""
        return read_low_rank(self, path, config, tensors)


FORM = "a low-rank delta, add(linear, mul(linear(linear(x, A), B), scale))"


def rows_of(runs: Iterable[tuple[int, int]], size: int) -> torch.Tensor:
    """bool[size, 1]: which outputs are in one of the ranges (start, stop)."""
    rows = torch.zeros(size, 1, dtype=torch.bool)
    for start, stop in runs:
        rows[start:stop] = True
    return rows


def _are_parameters(*factors: Any) -> bool:
    return all(isinstance(item, fx.Node) and reads_no_input(item) for item in factors)
