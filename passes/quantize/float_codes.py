"""Codes that are floating-point numbers of 8 bits, with one scale for each output channel: fp8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from bmgraph.analysis.weight_sites import Weight
from bmgraph.errors import InputError
from bmgraph.ir.editor import Editor
from bmgraph.pass_manager.target import Target
from bmgraph.passes.quantize.channel_codes import dequantized, reduced_axis, times_scales
from bmgraph.passes.quantize.code_grid import Encoded
from bmgraph.passes.quantize.mse import ScaleRule
from bmgraph.passes.quantize.weight_format import WeightFormat
from bmgraph.utils.stored_tensor import in_memory, row_blocks

E4M3 = torch.float8_e4m3fn
"""4 bits of exponent, 3 of mantissa, no infinities."""

LARGEST = torch.finfo(E4M3).max
"""448."""


@dataclass(frozen=True)
class FloatCodes(WeightFormat):
    """e4m3 codes, and one scale for each index of the outputs' axis, by the largest magnitude, which becomes 448.

    A code is within 1/16 of its value, or within 2^-10 scales where it is small. Source: Micikevicius et al. 2022 (arXiv:2209.05433).
    """

    granularity: ClassVar[str] = "channel"
    activation_modes: ClassVar[tuple[str, ...]] = ("static", "none")
    input_codes: ClassVar[torch.dtype | None] = E4M3

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
        return 0.1

    def takes_experts(self, target: Target) -> bool:
        """No target has a form for them that was tried."""
        return False

    def encode(self, weight: torch.Tensor, axis: int, rule: ScaleRule | None = None) -> Encoded:
        """e4m3 codes of a weight, and one scale per index of `axis`."""
        reduced = reduced_axis(weight.dim(), axis)
        if weight.device.type == "meta":
            return Encoded(torch.empty_like(weight, dtype=E4M3), weight.amax(reduced))
        if axis != 0:
            return _rounded(in_memory(weight), reduced)
        codes = torch.empty(weight.shape, dtype=E4M3, device=weight.device)
        scale = torch.empty(len(weight), dtype=weight.dtype, device=weight.device)
        for first, block in row_blocks(weight):
            rows = slice(first, first + len(block))
            codes[rows], scale[rows], _ = _rounded(block, reduced)
        return Encoded(codes, scale)

    def decode(self, stored: Encoded, shape: torch.Size, axis: int) -> torch.Tensor:
        """Codes times scales."""
        return times_scales(stored, shape, axis)

    def call(self, editor: Editor, readers: tuple[fx.Node, ...], weight: Weight, like: fx.Node) -> fx.Node:
        """Add `bmgraph::dequantize`."""
        return dequantized(editor, readers, weight, like)

    def simulate(self, editor: Editor, weight: Weight, step: fx.Node, like: fx.Node) -> fx.Node:
        """Raise InputError: fp8 codes do not train."""
        raise InputError(f"{weight.site}: fp8 codes do not train: quantize after training")


def _rounded(weight: torch.Tensor, reduced: int) -> Encoded:
    """The nearest codes, and the scales along the axis `reduced`."""
    scale = weight.abs().amax(reduced) / LARGEST
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    inside = torch.clamp(weight / scale.unsqueeze(reduced), -LARGEST, LARGEST)
    return Encoded(inside.to(E4M3), scale)
