"""Rounded inputs of products: static scales, scales measured at each call, scales of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from bmgraph.analysis.weight_sites import Weight
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import NodeRole
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.target import ROW
from bmgraph.passes.quantize.ranges import BINS, RangeRule
from bmgraph.verify.site_outputs import entering

aten = torch.ops.aten

U8, S8 = torch.iinfo(torch.uint8), torch.iinfo(torch.int8)


@dataclass
class Range:
    """The smallest and largest value observed; the range always includes 0."""

    low: float = 0.0
    high: float = 0.0

    def grid(self, symmetric: bool, codes: torch.dtype | None = None) -> Grid:
        """The grid that covers the range: s8 around 0, or u8 with a zero point; or floating-point codes, if these are given."""
        if codes is not None:
            largest = max(-self.low, self.high)
            return Grid(largest / torch.finfo(codes).max if largest > 0 else 1.0, 0, codes)
        if symmetric:
            largest = max(-self.low, self.high)
            return Grid(largest / S8.max if largest > 0 else 1.0, 0, torch.int8)
        width = self.high - self.low
        scale = width / (U8.max - U8.min) if width > 0 else 1.0
        return Grid(scale, min(U8.max, max(U8.min, round(-self.low / scale))), torch.uint8)


@dataclass(frozen=True)
class Grid:
    """The values of a static rounding: (code - zero_point) * scale for every code of a dtype."""

    scale: float
    zero_point: int
    dtype: torch.dtype

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """A value, rounded and dequantized."""
        zero_point = torch.tensor(self.zero_point, dtype=self.dtype, device=x.device)
        return torch.ops.bmgraph.quantize_static(x, x.new_tensor(self.scale), zero_point)  # type: ignore[no-any-return]


@dataclass
class InputRounding:
    """How the inputs of products are rounded: by `mode`, with static `grids` by the name of what enters, or by `blocks` of
    values where a product is listed. Products that read the same value share its rounding. With `trains` static scales do."""

    mode: str
    grids: Mapping[str, Grid] = field(default_factory=dict)
    blocks: Mapping[fx.Node, int | None] = field(default_factory=dict)
    trains: bool = False
    _rounded: dict[tuple[fx.Node, int | None], fx.Node] = field(default_factory=dict)

    def alone(self) -> InputRounding:
        """The same for a part of the graph that shares no rounding with others."""
        return InputRounding(self.mode, self.grids, self.blocks, self.trains)

    def value(self, product: fx.Node, x: torch.Tensor) -> torch.Tensor:
        """The input x of a product as it is rounded and dequantized."""
        if self.mode == "none":
            return x
        block, grid = self.blocks.get(product), self.grids.get(entering(product).name)
        if block is not None:
            return torch.ops.bmgraph.quantize_blocks(x, block)  # type: ignore[no-any-return]
        if self.mode == "dynamic" or grid is None:
            return torch.ops.bmgraph.quantize_dynamic(x)  # type: ignore[no-any-return]
        return grid.rounded(x)

    def apply(self, editor: Editor, product: fx.Node, site: str) -> None:
        """Let a product read its input rounded."""
        if self.mode == "none":
            return
        x, block = product.args[0], self.blocks.get(product)
        assert isinstance(x, fx.Node)
        if (x, block) not in self._rounded:
            self._rounded[x, block] = self._node(editor, x, product, site, block)
        product.update_arg(0, self._rounded[x, block])

    def _node(self, editor: Editor, x: fx.Node, product: fx.Node, site: str, block: int | None) -> fx.Node:
        """Add the node that rounds the input of a product."""
        if block is not None:
            return editor.call(
                torch.ops.bmgraph.quantize_blocks.default,
                x,
                block,
                like=product,
                site=site,
                part=NodeRole.ACTIVATION,
            )
        if self.mode == "dynamic":
            return editor.call(
                torch.ops.bmgraph.quantize_dynamic.default,
                x,
                like=product,
                site=site,
                part=NodeRole.ACTIVATION,
            )
        return rounded_to(editor, x, self.grids[entering(product).name], product, site, self.trains)


def rounded_to(
    editor: Editor, x: fx.Node, grid: Grid, reader: fx.Node, site: str, trains: bool = False
) -> fx.Node:
    """Add the node that rounds a value to a grid, in front of one that reads it; the numbers of the grid are named after a site, and
    its scale may train."""
    dtype, device = x.meta["val"].dtype, editor.program.device
    scale = editor.parameter(
        editor.fresh(f"{site}_input_scale"),
        torch.tensor(grid.scale, dtype=dtype, device=device),
        frozen=not trains,
        part=NodeRole.STEP if trains else NodeRole.SCALE,
    )
    zero_point = editor.parameter(
        editor.fresh(f"{site}_input_zero"),
        torch.tensor(grid.zero_point, dtype=grid.dtype, device=device),
        frozen=True,
        part=NodeRole.ZERO_POINT,
    )
    return editor.call(
        torch.ops.bmgraph.quantize_static.default, x, scale, zero_point, like=reader, site=site, part=NodeRole.ACTIVATION
    )  # fmt: skip


def expert_blocks(sites: Iterable[tuple[fx.Node, Weight]], blocks: tuple[int, ...]) -> dict[fx.Node, int]:
    """The block size (values of a row per scale) for the inputs of experts.

    One kernel runs all products that follow one routing decision, so they share the largest block that divides each of
    their input sizes; where blocks are whole rows, each has its own.
    """
    groups: dict[fx.Node, list[fx.Node]] = {}
    for linear, _ in sites:
        if linear.target is not aten.linear.default:
            ids = linear.args[2]
            assert isinstance(ids, fx.Node)
            groups.setdefault(ids, []).append(linear)
    found: dict[fx.Node, int] = {}
    for group in groups.values():
        sizes = [int(linear.args[1].meta["val"].shape[-1]) for linear in group]  # type: ignore[union-attr]
        if ROW in blocks:
            found |= zip(group, sizes)
            continue
        block = next((block for block in blocks if all(size % block == 0 for size in sizes)), None)
        if block is not None:
            found |= dict.fromkeys(group, block)
    return found


def ranges_of(
    program: Program,
    context: Context,
    names: set[str],
    rule: RangeRule | None = None,
    symmetric: bool = False,
) -> dict[str, Range]:
    """The range of each value over all calibration batches, by node name.

    With a `rule` values are counted in a second run of the batches, and it chooses; with `symmetric` around 0.
    """

    def measured() -> dict[str, tuple[float, float]]:
        ranges: dict[str, Range] = {}

        def visit(name: str, value: torch.Tensor) -> None:
            seen = ranges.setdefault(name, Range())
            seen.low = min(seen.low, float(value.min()))
            seen.high = max(seen.high, float(value.max()))

        context.calibrate(program, names, visit)
        found = ranges if rule is None else _chosen_ranges(program, context, ranges, rule, symmetric)
        return {name: (item.low, item.high) for name, item in found.items()}

    return {name: Range(*ends) for name, ends in context.kept("ranges of activations", measured).items()}


def _chosen_ranges(
    program: Program, context: Context, whole: Mapping[str, Range], rule: RangeRule, symmetric: bool
) -> dict[str, Range]:
    """What a rule chooses of whole ranges; it gets the counts of values in them."""
    ends = {name: (seen.low, seen.high) for name, seen in whole.items()}
    if symmetric:
        ends = {name: (-max(-low, high), max(-low, high)) for name, (low, high) in ends.items()}
    counts = {name: torch.zeros(BINS, dtype=torch.float64) for name in ends}

    def count(name: str, value: torch.Tensor) -> None:
        low, high = ends[name]
        if high > low:
            counts[name] += torch.histc(value.float(), BINS, low, high).double().cpu()

    context.calibrate(program, set(ends), count)
    found = {name: rule(counts[name], *ends[name]) for name in ends if ends[name][1] > ends[name][0]}
    return {**whole, **{name: Range(min(low, 0.0), max(high, 0.0)) for name, (low, high) in found.items()}}
