"""Weight-decomposed low-rank deltas (DoRA) on linears: their form in a graph, and their arithmetic.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv:2402.09353). The linear multiplies by rows of W + scale * B A
that have the norm m instead of their own; the norm gets no gradient (section 4.3 of the paper):

    y      = linear(x, W, b)
    g      = div(m, detach(linalg_vector_norm(add(W, mul(matmul(B, A), scale)), 2, [1])))     m, g [out]
    change = add(mul(sub(y, b), sub(g, 1)), mul(mul(linear(linear(x, A), B), scale), g))      A [r, in], B [out, r]
    total  = add(y, change)

With dropout, `linear(dropout(x), W)` replaces `sub(y, b)`. On some outputs alone, `mul(B, rows)` replaces B, and
`mul(sub(g, 1), squeeze(rows))` replaces `sub(g, 1)`; rows is bool[out, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.weight_sites import Weight
from bmgraph.deltas.delta_calls import DeltaCalls
from bmgraph.deltas.family import Change, Delta, Part, Saved
from bmgraph.deltas.forms import Hole
from bmgraph.deltas.linear_family import ROWS, LinearFamily
from bmgraph.deltas.low_rank import SCALE, A, B, LowRank
from bmgraph.deltas.low_rank_format import DROPOUT, MAGNITUDE, read_low_rank, saved_low_rank
from bmgraph.deltas.module_matching import Sizes
from bmgraph.ir.node_role import delta_role
from bmgraph.ir.program import Program

aten = torch.ops.aten


class DoRAFamily(LinearFamily):
    """Deltas that make W + scale * B A of a weight W, and scale its rows to the norms m."""

    name = "dora"
    roles = (delta_role("dora"),)
    peft_type = "LORA"
    variant = "use_dora"
    exclusive = True
    faster = (B, MAGNITUDE)
    optional = (ROWS,)
    choices = MappingProxyType({DROPOUT: (0.0, Hole(DROPOUT))})
    keys = (A, B, MAGNITUDE, ROWS)
    axes = {A: 2, B: 2, MAGNITUDE: 1, ROWS: 2}
    numbers = (SCALE,)

    def build(
        self, call: DeltaCalls, tensors: Mapping[str, fx.Node], change: Change, options: Mapping[str, Any]
    ) -> fx.Node:
        """Add the change to the output."""
        b, scale, rows = tensors[B], change.numbers[SCALE], tensors.get(ROWS)
        if rows is not None:
            b = call(aten.mul.Tensor, b, rows)
        product = call(aten.mul.Tensor, call(aten.matmul.default, b, tensors[A]), scale)
        moved = call(aten.add.Tensor, call.weight, product)
        norm = call(aten.detach.default, call(aten.linalg_vector_norm.default, moved, 2, [1]))
        gain = call(aten.div.Tensor, tensors[MAGNITUDE], norm)
        excess = call(aten.sub.Tensor, gain, 1)
        if rows is not None:
            excess = call(aten.mul.Tensor, excess, call(aten.squeeze.dim, rows, 1))
        x, plain = call.input, call.linear
        if options.get(DROPOUT):
            x = call(aten.dropout.default, x, options[DROPOUT], True)
            plain = call(aten.linear.default, x, call.weight)
        elif call.bias is not None:
            plain = call(aten.sub.Tensor, plain, call.bias)
        up = call(aten.linear.default, call(aten.linear.default, x, tensors[A]), b)
        scaled = call(aten.mul.Tensor, call(aten.mul.Tensor, up, scale), gain)
        changed = call(aten.add.Tensor, call(aten.mul.Tensor, plain, excess), scaled)
        return call.end(aten.add.Tensor, call.linear, changed)

    def sizes(self, change: Change) -> Sizes:
        """Outputs of B, inputs of A."""
        return change.tensors[B].shape[0], change.tensors[A].shape[1]

    def describe(self, change: Change) -> str:
        """Its rank."""
        return f"rank {change.tensors[A].shape[0]}, magnitudes"

    def folded(
        self, change: Change, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """W + scale * B A, its rows scaled to the norms m, and the same bias."""
        moved = weight + change.numbers[SCALE] * (change.tensors[B] @ change.tensors[A])
        folded = moved * (change.tensors[MAGNITUDE] / moved.norm(dim=1))[:, None]
        if ROWS in change.tensors:
            folded = torch.where(change.tensors[ROWS], folded, weight)
        return folded, bias

    def why_not_folded(self, program: Program, delta: Delta, weight: Weight) -> str:
        """A weight whose inputs were copied does not fit A any more."""
        return LowRank().why_not_folded(program, delta, weight)

    def saved(self, program: Program) -> Saved | None:
        """PEFT's configuration, factors and magnitudes."""
        return saved_low_rank(self, program, self.by_module(program))

    def loaded(self, path: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> Part:
        """Read PEFT's configuration, factors and magnitudes."""
        return read_low_rank(self, path, config, tensors)
