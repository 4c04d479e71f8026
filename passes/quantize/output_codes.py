"""Codes with one scale for each output channel, whatever type they have."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from bmgraph.analysis.weight_sites import Weight
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import NodeRole
from bmgraph.passes.quantize.code_grid import Encoded
from bmgraph.passes.quantize.mse import ScaleRule
from bmgraph.passes.quantize.weight_format import WeightFormat
from bmgraph.utils.stored_tensor import in_memory, row_blocks


@dataclass(frozen=True)
class OutputCodes(WeightFormat):
    """Codes of the type `codes`, and one scale for each index of the outputs' axis (of experts [E, out, in]: for each expert and index)."""

    granularity: ClassVar[str] = "channel"
    codes: ClassVar[torch.dtype]

    @property
    def site_drift(self) -> float:
        """The bound on the output of a site."""
        return 0.1

    @property
    def drift(self) -> float:
        """The bound on outputs of the model."""
        return 0.3

    @abstractmethod
    def rounded(self, weight: torch.Tensor, reduced: int, rule: ScaleRule | None) -> Encoded:
        """The codes of a weight in memory, and the scales along the axis `reduced`, which the product sums over."""

    def encode(self, weight: torch.Tensor, axis: int, rule: ScaleRule | None = None) -> Encoded:
        """Codes of a weight, and one scale for each index of `axis`."""
        reduced = _reduced_axis(weight.dim(), axis)
        if weight.device.type == "meta":
            return Encoded(torch.empty_like(weight, dtype=self.codes), weight.amax(reduced))
        if weight.dim() != 2 or axis != 0:
            return self.rounded(in_memory(weight), reduced, rule)
        codes = torch.empty(weight.shape, dtype=self.codes, device=weight.device)
        scale = torch.empty(len(weight), dtype=weight.dtype, device=weight.device)
        for first, block in row_blocks(weight):
            rows = slice(first, first + len(block))
            codes[rows], scale[rows], _ = self.rounded(block, reduced, rule)
        return Encoded(codes, scale)

    def decode(self, stored: Encoded, shape: torch.Size, axis: int) -> torch.Tensor:
        """Codes times scales."""
        scale = stored.scale.unsqueeze(_reduced_axis(len(shape), axis))
        return stored.codes.to(scale.dtype) * scale

    def call(self, editor: Editor, readers: tuple[fx.Node, ...], weight: Weight, like: fx.Node) -> fx.Node:
        """Add `bmgraph::dequantize`."""
        return editor.call(
            torch.ops.bmgraph.dequantize.default, *readers, weight.channel_axis,
            like=like, site=weight.site, part=NodeRole.WEIGHT,
        )  # fmt: skip


def scales_to(largest: float, weight: torch.Tensor, reduced: int) -> torch.Tensor:
    """The scales by which the largest magnitudes along an axis become `largest`; 1 for zeros alone."""
    scale = weight.abs().amax(reduced) / largest
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _reduced_axis(axes: int, axis: int) -> int:
    """The axis of a weight that the product sums over, given the `axis` of its outputs."""
    return 1 - axis if axes == 2 else 3 - axis
