"""Codes of integers with one scale for each output channel: int8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from bmgraph.analysis.weight_sites import Weight
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import NodeRole
from bmgraph.pass_manager.target import Target
from bmgraph.passes.quantize.code_grid import CodeGrid, Encoded
from bmgraph.passes.quantize.mse import ScaleRule
from bmgraph.passes.quantize.output_codes import OutputCodes, scales_to


@dataclass(frozen=True)
class ChannelCodes(OutputCodes):
    """s8 codes from -`largest` to `largest`, with scales by the largest magnitude.

    Source: Krishnamoorthi 2018 (per-channel weights).
    """

    codes: ClassVar[torch.dtype] = torch.int8
    activation_modes: ClassVar[tuple[str, ...]] = ("static", "dynamic", "none")

    largest: int

    @property
    def weight_bound(self) -> float:
        """The bound on a weight."""
        return 0.2

    def takes_experts(self, target: Target) -> bool:
        """Every target has a form for them."""
        return True

    def rounded(self, weight: torch.Tensor, reduced: int, rule: ScaleRule | None) -> Encoded:
        """The nearest codes; a rule may choose other scales."""
        scale, largest = scales_to(self.largest, weight, reduced), self.largest
        if rule is not None:
            values = weight.movedim(reduced, -1).to(torch.promote_types(weight.dtype, torch.float32))
            grid = CodeGrid(scale.to(values.dtype))
            scale = rule(values, grid, -largest, largest).scale.to(weight.dtype)
        codes = torch.clamp(torch.round(weight / scale.unsqueeze(reduced)), -largest, largest).to(self.codes)
        return Encoded(codes, scale)

    def simulate(self, editor: Editor, weight: Weight, step: fx.Node, like: fx.Node) -> fx.Node:
        """Add `bmgraph::fake_quantize`."""
        return editor.call(
            torch.ops.bmgraph.fake_quantize.default, weight.node, step, weight.channel_axis, -self.largest, self.largest,
            like=like, site=weight.site, part=NodeRole.WEIGHT,
        )  # fmt: skip
