"""Codes of few bits with one scale for each block of inputs: int4, int8 in groups, and tables of embeddings in 8 or 4 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from bmgraph.analysis.weight_sites import Weight
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import NodeRole
from bmgraph.ops.block_codes import dequantize_blocks, pack_codes
from bmgraph.passes.quantize.mse import ScaleRule
from bmgraph.passes.quantize.weight_format import WeightFormat
from bmgraph.utils.stored_tensor import in_memory, row_blocks

BLOCKS = (16, 32, 64, 128, 256)
"""Numbers of inputs that may share a scale: kernels have these."""

USUAL_BLOCK = 32
"""How many inputs share a scale where nobody says."""

DRIFTS = {2: (0.9, 1.2, 0.9), 3: (0.7, 0.8, 0.7), 4: (0.5, 0.6, 0.5), 8: (0.1, 0.3, 0.1)}
"""Bits -> default bounds on the output of a site, on outputs of the model, and on a weight (relative L2)."""


@dataclass(frozen=True)
class BlockCodes(WeightFormat):
    """Packed codes of `bits` bits and one scale for each `block` inputs of an output (`bmgraph::dequantize_blocks`).

    Codes go from -2 ** (bits - 1) to 2 ** (bits - 1) - 1, and the value of a block with the largest magnitude gets the least
    one, so its scale has the other sign. With `positive` scales are positive, and codes symmetric around 0.
    """

    granularity: ClassVar[str] = "block"
    activation_modes: ClassVar[tuple[str, ...]] = ("blocks", "none")
    preferred_modes: ClassVar[tuple[str, ...]] = ("blocks", "none")
    takes_experts: ClassVar[bool] = False

    bits: int
    block: int
    positive: bool = False

    @property
    def site_drift(self) -> float:
        """The bound on the output of a site."""
        return DRIFTS[self.bits][0]

    @property
    def drift(self) -> float:
        """The bound on outputs of the model."""
        return DRIFTS[self.bits][1]

    @property
    def weight_bound(self) -> float:
        """The bound on a weight."""
        return DRIFTS[self.bits][2]

    @property
    def input_block(self) -> int:
        """The blocks of inputs that share scales of weights: kernels round these."""
        return self.block

    @property
    def least(self) -> int:
        """The least code."""
        return -self.most if self.positive else -self.most - 1

    @property
    def most(self) -> int:
        """The largest code."""
        return int(2 ** (self.bits - 1) - 1)

    def encode(
        self, weight: torch.Tensor, axis: int, rule: ScaleRule | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes u8[N, B, bytes] and scales f[N, B] of a weight f[N, K], or f[K, N] with `axis` = 1."""
        rows, columns = weight.shape if axis == 0 else weight.shape[::-1]
        count, width = -(-columns // self.block), self.block * self.bits // 8
        codes = torch.empty(rows, count, width, dtype=torch.uint8, device=weight.device)
        scale = torch.empty(rows, count, dtype=weight.dtype, device=weight.device)
        if weight.device.type == "meta":
            return codes, scale
        for first, part in row_blocks(weight) if axis == 0 else [(0, in_memory(weight).T)]:
            taken = slice(first, first + len(part))
            values = part.to(torch.promote_types(part.dtype, torch.float32))
            widest = self.scales(values)
            scale[taken] = rule(self.in_blocks(values), widest, self.least, self.most) if rule else widest
            codes[taken] = self.packed(self.nearest(values, scale[taken].to(values.dtype)))
        return codes, scale

    def scales(self, weight: torch.Tensor) -> torch.Tensor:
        """The scales f[N, B] that the largest values of blocks of a weight f[N, K] fill."""
        blocks = self.in_blocks(weight)
        if self.positive:
            scale = blocks.abs().amax(-1) / self.most
        else:
            largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)).squeeze(-1)
            scale = largest / self.least
        return torch.where(scale != 0, scale, torch.ones_like(scale))

    def nearest(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The nearest codes i8[N, K] at given scales."""
        steps = scale.repeat_interleave(self.block, 1)[:, : weight.shape[1]]
        return torch.clamp(torch.round(weight / steps), self.least, self.most).to(torch.int8)

    def packed(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes i8[N, K] as they are stored."""
        return pack_codes(codes, self.bits, self.block)

    def in_blocks(self, weight: torch.Tensor) -> torch.Tensor:
        """f[N, K] as f[N, B, block], filled up with zeros."""
        filled = torch.nn.functional.pad(weight, (0, -weight.shape[1] % self.block))
        return filled.reshape(len(weight), -1, self.block)

    def decode(self, codes: torch.Tensor, scale: torch.Tensor, shape: torch.Size, axis: int) -> torch.Tensor:
        """Codes times scales, in the layout of the weight."""
        value: torch.Tensor = dequantize_blocks(codes, scale, self.bits, shape[1 - axis])
        return value if axis == 0 else value.T

    def call(
        self, editor: Editor, readers: tuple[fx.Node, fx.Node], weight: Weight, like: fx.Node
    ) -> fx.Node:
        """Add `bmgraph::dequantize_blocks`, transposed where the weight is stored [in, out]."""
        axis = weight.channel_axis
        columns = int(weight.node.meta["val"].shape[1 - axis])
        made = editor.call(
            torch.ops.bmgraph.dequantize_blocks.default, *readers, self.bits, columns,
            like=like, site=weight.site, part="" if axis else NodeRole.WEIGHT,
        )  # fmt: skip
        if not axis:
            return made
        return editor.call(torch.ops.aten.t.default, made, like=like, site=weight.site, part=NodeRole.WEIGHT)
