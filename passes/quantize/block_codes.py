"""Codes of few bits with one scale, and perhaps one zero point, for each block of inputs: int4, int8 in groups, and tables of embeddings in 8 or 4 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from bmgraph.analysis.weight_sites import Weight
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import NodeRole
from bmgraph.ops.block_codes import dequantize_blocks, pack_codes, pack_zeros, zero_bytes
from bmgraph.pass_manager.target import Target
from bmgraph.passes.quantize.code_grid import CodeGrid, Encoded, bounded
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
    one, so its scale has the other sign. With `positive` scales are positive, and codes symmetric around 0. Where they are not
    `symmetric`, each block has a zero point, too: scales are positive, codes span a block's values and 0, and all are used.
    """

    granularity: ClassVar[str] = "block"
    activation_modes: ClassVar[tuple[str, ...]] = ("blocks", "none")
    preferred_modes: ClassVar[tuple[str, ...]] = ("blocks", "none")

    bits: int
    block: int
    positive: bool = False
    symmetric: bool = True

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
        return -self.most if self.positive and self.symmetric else -self.most - 1

    @property
    def most(self) -> int:
        """The largest code."""
        return int(2 ** (self.bits - 1) - 1)

    def takes_experts(self, target: Target) -> bool:
        """As the target says."""
        return self.bits in target.expert_bits

    def encode(self, weight: torch.Tensor, axis: int, rule: ScaleRule | None = None) -> Encoded:
        """Codes u8[N, B, bytes], scales f[N, B] and zero points u8[N, ceil(B * bits / 8)] of a weight f[N, K], or f[K, N] with `axis` = 1;
        with E in front of experts f[E, N, K]."""
        if weight.dim() == 3:
            flat, leading = self.encode(in_memory(weight).flatten(0, 1), 0, rule), weight.shape[:2]
            zeros = None if flat.zero is None else flat.zero.reshape(*leading, -1)
            codes = flat.codes.reshape(*leading, *flat.codes.shape[1:])
            return Encoded(codes, flat.scale.reshape(*leading, -1), zeros)
        rows, columns = weight.shape if axis == 0 else weight.shape[::-1]
        count, width = -(-columns // self.block), self.block * self.bits // 8
        codes = torch.empty(rows, count, width, dtype=torch.uint8, device=weight.device)
        scale = torch.empty(rows, count, dtype=weight.dtype, device=weight.device)
        zero = None if self.symmetric else codes.new_empty(rows, zero_bytes(count, self.bits))
        stored = Encoded(codes, scale, zero)
        if weight.device.type == "meta":
            return stored
        for first, part in row_blocks(weight) if axis == 0 else [(0, in_memory(weight).T)]:
            taken = slice(first, first + len(part))
            values = part.to(torch.promote_types(part.dtype, torch.float32))
            grid = self.widest(values)
            if rule is not None:
                grid = rule(self.in_blocks(values), grid, self.least, self.most)
            grid = grid.typed(weight.dtype)
            found = self.stored(self.nearest(values, grid.typed(values.dtype)), grid)
            for whole, some in zip(stored, found):
                if whole is not None and some is not None:
                    whole[taken] = some
        return stored

    def widest(self, weight: torch.Tensor) -> CodeGrid:
        """The grids [N, B] that the largest values of blocks of a weight f[N, K] fill."""
        blocks = self.in_blocks(weight)
        if not self.symmetric:
            return CodeGrid.covering(blocks, self.least, self.most)
        if self.positive:
            scale = blocks.abs().amax(-1) / self.most
        else:
            largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)).squeeze(-1)
            scale = largest / self.least
        return CodeGrid(torch.where(scale != 0, scale, torch.ones_like(scale)))

    def empty(self, weight: torch.Tensor) -> CodeGrid:
        """Grids f32[N, B] of a weight f[N, K], to be written."""
        scale = torch.empty(len(weight), -(-weight.shape[1] // self.block), device=weight.device)
        return CodeGrid(scale, None if self.symmetric else torch.empty_like(scale))

    def nearest(self, weight: torch.Tensor, grid: CodeGrid) -> torch.Tensor:
        """The nearest codes i8[N, K] on given grids [N, B]."""
        by_column = self.by_column(grid, weight.shape[1])
        steps = bounded(weight / by_column.scale, by_column.zero, self.least, self.most)
        return (steps if by_column.zero is None else steps + by_column.zero).to(torch.int8)

    def steps(self, codes: torch.Tensor, grid: CodeGrid) -> torch.Tensor:
        """How many steps from 0 codes i8[N, K] stand for, f[N, K]."""
        zero = self.by_column(grid, codes.shape[1]).zero
        steps = codes.to(grid.scale.dtype)
        return steps if zero is None else steps - zero

    def by_column(self, grid: CodeGrid, columns: int) -> CodeGrid:
        """Grids [N, B] as grids [N, K], those of each column."""
        scale, zero = (
            None if item is None else item.repeat_interleave(self.block, 1)[:, :columns] for item in grid
        )
        assert scale is not None
        return CodeGrid(scale, zero)

    def stored(self, codes: torch.Tensor, grid: CodeGrid) -> Encoded:
        """Codes i8[N, K] and grids [N, B] as they are stored."""
        zero = None if grid.zero is None else grid.zero.to(torch.int8)
        packed = pack_codes(codes, self.bits, self.block, zero)
        return Encoded(packed, grid.scale, None if zero is None else pack_zeros(zero, self.bits))

    def in_blocks(self, weight: torch.Tensor) -> torch.Tensor:
        """f[N, K] as f[N, B, block], filled up with zeros."""
        filled = torch.nn.functional.pad(weight, (0, -weight.shape[1] % self.block))
        return filled.reshape(len(weight), -1, self.block)

    def decode(self, stored: Encoded, shape: torch.Size, axis: int) -> torch.Tensor:
        """Codes times scales, in the layout of the weight."""
        stored_by_inputs = len(shape) == 2 and axis == 1
        columns = shape[0 if stored_by_inputs else -1]
        value: torch.Tensor = dequantize_blocks(stored.codes, stored.scale, self.bits, columns, stored.zero)
        return value.T if stored_by_inputs else value

    def call(self, editor: Editor, readers: tuple[fx.Node, ...], weight: Weight, like: fx.Node) -> fx.Node:
        """Add `bmgraph::dequantize_blocks`, transposed where the weight is stored [in, out]."""
        columns = int(weight.node.meta["val"].shape[0 if weight.transposed else -1])
        made = editor.call(
            torch.ops.bmgraph.dequantize_blocks.default, *readers[:2], self.bits, columns, *readers[2:],
            like=like, site=weight.site, part="" if weight.transposed else NodeRole.WEIGHT,
        )  # fmt: skip
        if not weight.transposed:
            return made
        return editor.call(torch.ops.aten.t.default, made, like=like, site=weight.site, part=NodeRole.WEIGHT)

    def simulate(self, editor: Editor, weight: Weight, step: fx.Node, like: fx.Node) -> fx.Node:
        """Add `bmgraph::fake_quantize_blocks`."""
        return editor.call(
            torch.ops.bmgraph.fake_quantize_blocks.default, weight.node, step, weight.channel_axis, self.block, self.least, self.most,
            like=like, site=weight.site, part=NodeRole.WEIGHT,
        )  # fmt: skip
