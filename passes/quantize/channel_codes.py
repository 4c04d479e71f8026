"""Codes with one scale for each output channel: int8."""

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
from bmgraph.passes.quantize.weight_format import WeightFormat
from bmgraph.utils.stored_tensor import in_memory, row_blocks


@dataclass(frozen=True)
class ChannelCodes(WeightFormat):
    """s8 codes from -`largest` to `largest`, and one scale for each index of the outputs' axis, by the largest magnitude.

    Source: Krishnamoorthi 2018 (per-channel weights).
    """

    granularity: ClassVar[str] = "channel"
    activation_modes: ClassVar[tuple[str, ...]] = ("static", "dynamic", "none")

    largest: int

    @property
    def site_drift(self) -> float:
        """The bound on the output of a site."""
        return 0.1

    @property
    def drift(self) -> float:
        """The bound on outputs of the model."""
        return 0.3

    @property
    def weight_bound(self) -> float:
        """The bound on a weight."""
        return 0.2

    def takes_experts(self, target: Target) -> bool:
        """Every target has a form for them."""
        return True

    def encode(self, weight: torch.Tensor, axis: int, rule: ScaleRule | None = None) -> Encoded:
        """s8 codes of a weight, and one scale per index of `axis` (for experts [E, out, in]: per expert and index)."""
        reduced = reduced_axis(weight.dim(), axis)
        if weight.device.type == "meta":
            return Encoded(torch.empty_like(weight, dtype=torch.int8), weight.amax(reduced))
        if weight.dim() != 2 or axis != 0:
            return _rounded(in_memory(weight), reduced, self.largest, rule)
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scale = torch.empty(len(weight), dtype=weight.dtype, device=weight.device)
        for first, block in row_blocks(weight):
            rows = slice(first, first + len(block))
            codes[rows], scale[rows], _ = _rounded(block, reduced, self.largest, rule)
        return Encoded(codes, scale)

    def decode(self, stored: Encoded, shape: torch.Size, axis: int) -> torch.Tensor:
        """Codes times scales."""
        return times_scales(stored, shape, axis)

    def call(self, editor: Editor, readers: tuple[fx.Node, ...], weight: Weight, like: fx.Node) -> fx.Node:
        """Add `bmgraph::dequantize`."""
        return dequantized(editor, readers, weight, like)

    def simulate(self, editor: Editor, weight: Weight, step: fx.Node, like: fx.Node) -> fx.Node:
        """Add `bmgraph::fake_quantize`."""
        return editor.call(
            torch.ops.bmgraph.fake_quantize.default, weight.node, step, weight.channel_axis, -self.largest, self.largest,
            like=like, site=weight.site, part=NodeRole.WEIGHT,
        )  # fmt: skip


def _rounded(weight: torch.Tensor, reduced: int, largest: int, rule: ScaleRule | None) -> Encoded:
    """Codes of at most `largest`, and the scales along the axis `reduced`."""
    scale = weight.abs().amax(reduced) / largest
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if rule is not None:
        values = weight.movedim(reduced, -1).to(torch.promote_types(weight.dtype, torch.float32))
        grid = CodeGrid(scale.to(values.dtype))
        scale = rule(values, grid, -largest, largest).scale.to(weight.dtype)
    codes = torch.clamp(torch.round(weight / scale.unsqueeze(reduced)), -largest, largest).to(torch.int8)
    return Encoded(codes, scale)


def times_scales(stored: Encoded, shape: torch.Size, axis: int) -> torch.Tensor:
    """The weight of `shape`, whose outputs lie along `axis`, that codes and one scale for each output stand for."""
    scale = stored.scale.unsqueeze(reduced_axis(len(shape), axis))
    return stored.codes.to(scale.dtype) * scale


def dequantized(editor: Editor, readers: tuple[fx.Node, ...], weight: Weight, like: fx.Node) -> fx.Node:
    """Add `bmgraph::dequantize` in the place of a weight."""
    return editor.call(
        torch.ops.bmgraph.dequantize.default, *readers, weight.channel_axis,
        like=like, site=weight.site, part=NodeRole.WEIGHT,
    )  # fmt: skip


def reduced_axis(axes: int, axis: int) -> int:
    """The axis of a weight that the product sums over, given the `axis` of its outputs."""
    return 1 - axis if axes == 2 else 3 - axis
