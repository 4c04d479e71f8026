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
from bmgraph.passes.quantize.code_grid import Encoded
from bmgraph.passes.quantize.mse import ScaleRule
from bmgraph.passes.quantize.output_codes import OutputCodes, scales_to

E4M3 = torch.float8_e4m3fn
"""4 bits of exponent, 3 of mantissa, no infinities."""

LARGEST = torch.finfo(E4M3).max
"""448."""


@dataclass(frozen=True)
class FloatCodes(OutputCodes):
    """e4m3 codes, with scales by the largest magnitude, which becomes 448.

    A code is within 1/16 of its value, or within 2^-10 scales where it is small. Source: Micikevicius et al. 2022 (arXiv:2209.05433).
    """

    codes: ClassVar[torch.dtype] = E4M3
    activation_modes: ClassVar[tuple[str, ...]] = ("static", "none")
    input_codes: ClassVar[torch.dtype | None] = E4M3

    @property
    def weight_bound(self) -> float:
        """The bound on a weight."""
        return 0.1

    def takes_experts(self, target: Target) -> bool:
        """No target has a form for them that was tried."""
        return False

    def rounded(self, weight: torch.Tensor, reduced: int, rule: ScaleRule | None) -> Encoded:
        """The nearest codes."""
        scale = scales_to(LARGEST, weight, reduced)
        inside = torch.clamp(weight / scale.unsqueeze(reduced), -LARGEST, LARGEST)
        return Encoded(inside.to(E4M3), scale)

    def simulate(self, editor: Editor, weight: Weight, step: fx.Node, like: fx.Node) -> fx.Node:
        """Raise InputError: fp8 codes do not train."""
        raise InputError(f"{weight.site}: fp8 codes do not train: quantize after training")
