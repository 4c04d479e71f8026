"""Quantize: 8-bit integer weights and activations for linears and experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.site_filter import matches, resolve_patterns
from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.weight_sites import (
    Weight,
    product_sites,
    products,
    read_elsewhere,
    unnamed_weights,
    weight_of,
)
from bmgraph.errors import InputError, PassError, ResourceError
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import NodeRole
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import CALIBRATION, Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.pass_manager.target import Target
from bmgraph.passes.split_outliers import SplitOutliers
from bmgraph.utils.stored_tensor import in_memory, row_blocks
from bmgraph.verify.measures import Measure, WeightsMoved
from bmgraph.verify.site_outputs import SiteOutputErrors, entering

aten = torch.ops.aten

SCHEMES: dict[str, int] = {"int8": 127}
"""Name of a scheme -> its largest code; codes are symmetric around 0."""

GRANULARITY = "channel"
"""What one scale of a weight covers: an output channel."""

U8, S8 = torch.iinfo(torch.uint8), torch.iinfo(torch.int8)

ACTIVATIONS = (None, "static", "dynamic", "none")

MEASURED_BATCHES = 2
"""Number of calibration batches on which the drift of a site is measured."""


@dataclass(frozen=True, repr=False)
class Quantize(ModelPass):
    """Store the weights of linears as integer codes with one scale per output channel, and round activations.

    scheme: "int8" (symmetric, round to nearest). activations: "static" rounds the input of a linear to u8 with a scale
    measured on the calibration batches (to s8 around 0 where the target is symmetric), "dynamic" with a scale
    measured at each call over the whole tensor, "none" leaves it in floating point; the default is the best mode that
    the target supports: static with calibration, else dynamic, else none. include, exclude: globs over module paths.
    site_drift: a site whose output changes by more (relative L2, on calibration batches) is declined. outliers: with
    static scales, run `SplitOutliers` first.

    The weight stays an expression in front of `aten.linear`, so that later passes find the site. Weights that another
    operator reads too (tied embeddings), weights with a side below `smallest`, and routers are declined.

    Raises PassError where a glob matches nothing or no site is left, ResourceError where static scales have no
    calibration. Sources: Jacob et al. 2018 (affine quantization), Krishnamoorthi 2018 (per-channel weights).

    Example:
        >>> from bmgraph.passes import Quantize
        >>> Quantize("int8", exclude=("*.pooler.*",))
        quantize{exclude=[*.pooler.*]}
    """

    effect: ClassVar[Effect] = "approximate"
    provides: ClassVar[frozenset[str]] = frozenset({"quantized"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"quantized"})
    default_drift: ClassVar[float] = 0.3

    scheme: str = field(default="int8")
    activations: str | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    site_drift: float = 0.1
    outliers: bool = True
    smallest: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scheme not in SCHEMES:
            raise InputError(f"scheme={self.scheme!r}: choose one of {', '.join(SCHEMES)}")
        if self.activations not in ACTIVATIONS:
            raise InputError(f"activations={self.activations!r}: choose static, dynamic or none")
        if not self.site_drift > 0:
            raise InputError(f"site_drift={self.site_drift}: give a bound above 0")

    @property
    def measured(self) -> Measure:
        """Every code is the nearest one: the weights bound it."""
        return WeightsMoved(0.2)

    @property
    def resources(self) -> tuple[str, ...]:
        """Calibration batches, for static scales."""
        return (CALIBRATION,) if self.activations == "static" else ()

    def run(self, program: Program, context: Context) -> Program:
        """Quantize the selected linears and experts."""
        sites = product_sites(program)
        include = resolve_patterns(self.include, sites, "include")
        exclude = resolve_patterns(self.exclude, sites, "exclude")
        target = context.target
        calibrated = context.has(CALIBRATION) and program.device.type != "meta"
        mode = self._mode(target, calibrated)
        if mode not in target.activation_modes:
            raise PassError(
                f"{target.name} takes {', '.join(target.activation_modes)} activations, not {mode}"
            )
        if GRANULARITY not in target.weight_scales:
            raise PassError(f"{target.name} takes no weights with one scale for each {GRANULARITY}")
        if mode == "static" and self.outliers:
            program = context.run(SplitOutliers(include=include, exclude=exclude), program)
        chosen = self._choose(program, context, include, exclude)
        input_grids: dict[str, _Grid] = {}
        if mode == "static" and chosen:
            ranges = _ranges(program, context, chosen)
            input_grids = {name: seen.grid(target.symmetric) for name, seen in ranges.items()}
        blocks = _expert_blocks(chosen, target.expert_blocks) if mode != "none" else {}
        if calibrated:
            chosen = self._within_drift(program, context, chosen, mode, input_grids, blocks)
        with program.edit(by=str(self)) as editor:
            rounded: dict[tuple[fx.Node, int | None], fx.Node] = {}
            for linear, weight in chosen:
                self._rewrite(editor, linear, weight, mode, input_grids, rounded, blocks.get(linear))
            for site in dict.fromkeys(weight.site for _, weight in chosen):
                context.edited(
                    site,
                    f"{self.scheme} weight, {mode} activation" if mode != "none" else f"{self.scheme} weight",
                )
        return program

    def _mode(self, target: Target, calibrated: bool) -> str:
        """How activations are rounded: as asked, else the best mode that the target takes with what was given."""
        if self.activations is not None:
            return self.activations
        for mode in target.activation_modes:
            if calibrated or mode != "static":
                return mode
        raise ResourceError(
            f"{target.name} takes static activations only, whose scales are measured: pass calibration batches"
        )

    def _choose(
        self, program: Program, context: Context, include: tuple[str, ...], exclude: tuple[str, ...]
    ) -> list[tuple[fx.Node, Weight]]:
        found = [
            (node, weight)
            for node in products(program.graph)
            if (weight := weight_of(program, node)) is not None
        ]
        roles = find(program).roles
        axes: dict[str, set[int]] = {}
        for _, weight in found:
            axes.setdefault(weight.site, set()).add(weight.channel_axis)
        chosen = []
        declined = {
            site: reason
            for site, reason in unnamed_weights(program).items()
            if matches(site, include) and not matches(site, exclude)
        }
        for linear, weight in found:
            if not matches(weight.site, include) or matches(weight.site, exclude):
                continue
            reason = self._reason_to_decline(weight, roles.get(weight.site, ""))
            if len(axes[weight.site]) > 1:
                reason = "its outputs lie along one axis in one use and along the other in another"
            if reason:
                declined[weight.site] = reason
            else:
                chosen.append((linear, weight))
        for site, reason in declined.items():
            context.declined(site, reason)
        return chosen

    def _reason_to_decline(self, weight: Weight, role: str) -> str:
        """Why a weight cannot be quantized; empty where it can."""
        value = weight.node.meta["val"]
        if not value.is_floating_point() or value.dim() not in (2, 3):
            return f"its weight is {value.dtype} of {value.dim()} dimensions"
        if role == "router":
            return "it is a router: rounding its weight would change which experts it selects"
        rows, columns = (size * (value.shape[0] if value.dim() == 3 else 1) for size in value.shape[-2:])
        if min(rows, columns) < self.smallest:
            return f"its weight is only {rows} x {columns}, below smallest={self.smallest}"
        if read_elsewhere(weight):
            return "something else reads its weight too (a tied embedding)"
        return ""

    def codes(self, weight: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        """s8 codes of a weight, and one scale per index of `axis` (for experts [E, out, in]: per expert and index)."""
        largest, reduced = SCHEMES[self.scheme], _reduced_axis(weight, axis)
        if weight.device.type == "meta":
            return torch.empty_like(weight, dtype=torch.int8), weight.amax(reduced)
        if weight.dim() != 2 or axis != 0:
            return _rounded(in_memory(weight), reduced, largest)
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scale = torch.empty(len(weight), dtype=weight.dtype, device=weight.device)
        for first, block in row_blocks(weight):
            rows = slice(first, first + len(block))
            codes[rows], scale[rows] = _rounded(block, reduced, largest)
        return codes, scale

    def _within_drift(
        self,
        program: Program,
        context: Context,
        sites: list[tuple[fx.Node, Weight]],
        mode: str,
        grids: dict[str, _Grid],
        blocks: dict[fx.Node, int],
    ) -> list[tuple[fx.Node, Weight]]:
        """The sites whose output changes by at most `site_drift` on calibration data; the others are declined.

        A weight that is used several times stays as it is for all uses where one of them changes by more.
        """

        known: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # the program will hold as many bytes

        def replace(
            linear: fx.Node, weight: Weight, x: torch.Tensor, value: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            rounded = _round(x, mode, grids.get(entering(linear).name), blocks.get(linear))
            axis = weight.channel_axis
            if weight.site not in known:
                known[weight.site] = self.codes(value, axis)
            codes, scale = known[weight.site]
            return rounded, codes.to(scale.dtype) * scale.unsqueeze(_reduced_axis(value, axis))

        outputs = SiteOutputErrors(program, sites, replace)
        context.calibrate(program, outputs.names, outputs.visit, MEASURED_BATCHES)
        worst = outputs.errors
        for site, error in worst.items():
            if not error <= self.site_drift:
                context.declined(
                    site,
                    f"its output would change by {error:.3f} (relative), more than site_drift={self.site_drift:g}",
                )
        return [
            (linear, weight) for linear, weight in sites if worst.get(weight.site, 0.0) <= self.site_drift
        ]

    def _rewrite(
        self,
        editor: Editor,
        linear: fx.Node,
        weight: Weight,
        mode: str,
        grids: dict[str, _Grid],
        rounded: dict[tuple[fx.Node, int | None], fx.Node],
        block: int | None,
    ) -> None:
        self._quantize_weight(editor, weight)
        if mode == "none":
            return
        x = linear.args[0]
        assert isinstance(x, fx.Node)
        if (x, block) not in rounded:
            grid = grids.get(entering(linear).name)
            rounded[x, block] = _round_node(editor, x, linear, weight.site, mode, grid, block)
        linear.update_arg(0, rounded[x, block])

    def _quantize_weight(self, editor: Editor, weight: Weight) -> None:
        name = weight.site
        if f"{name}_codes" in editor.program.parameters:
            return
        codes, scale = self.codes(evaluate(editor.program, weight.node), weight.channel_axis)
        code_node = editor.parameter(f"{name}_codes", codes, like=weight.node, part=NodeRole.CODES)
        scale_node = editor.parameter(
            f"{name}_scale", scale, like=weight.node, frozen=True, part=NodeRole.SCALE
        )
        first = min(weight.node.users)
        dequantized = editor.call(
            torch.ops.bmgraph.dequantize.default, code_node, scale_node, weight.channel_axis,
            like=first, site=name, part=NodeRole.WEIGHT,
        )  # fmt: skip
        weight.node.replace_all_uses_with(dequantized)


def _rounded(weight: torch.Tensor, reduced: int, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of at most `largest`, and the scales along the axis `reduced`."""
    scale = weight.abs().amax(reduced) / largest
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = torch.clamp(torch.round(weight / scale.unsqueeze(reduced)), -largest, largest).to(torch.int8)
    return codes, scale


def _reduced_axis(weight: torch.Tensor, axis: int) -> int:
    """The axis of a weight that the product sums over, given the `axis` of its outputs."""
    return 1 - axis if weight.dim() == 2 else 3 - axis


@dataclass
class _Range:
    """The smallest and largest value observed; the range always includes 0."""

    low: float = 0.0
    high: float = 0.0

    def grid(self, symmetric: bool) -> _Grid:
        """The grid that covers the range: s8 around 0, or u8 with a zero point."""
        if symmetric:
            largest = max(-self.low, self.high)
            return _Grid(largest / S8.max if largest > 0 else 1.0, 0, torch.int8)
        width = self.high - self.low
        scale = width / (U8.max - U8.min) if width > 0 else 1.0
        return _Grid(scale, min(U8.max, max(U8.min, round(-self.low / scale))), torch.uint8)


@dataclass(frozen=True)
class _Grid:
    """The values of a static rounding: (code - zero_point) * scale for every code of a dtype."""

    scale: float
    zero_point: int
    dtype: torch.dtype


def _expert_blocks(sites: list[tuple[fx.Node, Weight]], blocks: tuple[int, ...]) -> dict[fx.Node, int]:
    """The block size (values of a row per scale) for the inputs of experts.

    One kernel runs all products that follow one routing decision, so they share the largest block that divides each of
    their input sizes.
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
        block = next((block for block in blocks if all(size % block == 0 for size in sizes)), None)
        if block is not None:
            found |= dict.fromkeys(group, block)
    return found


def _ranges(program: Program, context: Context, sites: list[tuple[fx.Node, Weight]]) -> dict[str, _Range]:
    """The range of the input of each site over all calibration batches, by node name."""
    ranges: dict[str, _Range] = {}

    def visit(name: str, value: torch.Tensor) -> None:
        seen = ranges.setdefault(name, _Range())
        seen.low = min(seen.low, float(value.min()))
        seen.high = max(seen.high, float(value.max()))

    context.calibrate(program, {entering(linear).name for linear, _ in sites}, visit)
    return ranges


def _round(x: torch.Tensor, mode: str, grid: _Grid | None, block: int | None) -> torch.Tensor:
    """An activation as it is rounded and dequantized in a mode."""
    if mode == "none":
        return x
    if block is not None:
        return torch.ops.bmgraph.quantize_blocks(x, block)  # type: ignore[no-any-return]
    if mode == "dynamic" or grid is None:
        return torch.ops.bmgraph.quantize_dynamic(x)  # type: ignore[no-any-return]
    zero_point = torch.tensor(grid.zero_point, dtype=grid.dtype, device=x.device)
    return torch.ops.bmgraph.quantize_static(x, x.new_tensor(grid.scale), zero_point)  # type: ignore[no-any-return]


def _round_node(
    editor: Editor, x: fx.Node, linear: fx.Node, site: str, mode: str, grid: _Grid | None, block: int | None
) -> fx.Node:
    """Add the node that rounds the input of a product."""
    if block is not None:
        return editor.call(
            torch.ops.bmgraph.quantize_blocks.default,
            x,
            block,
            like=linear,
            site=site,
            part=NodeRole.ACTIVATION,
        )
    if mode == "dynamic":
        return editor.call(
            torch.ops.bmgraph.quantize_dynamic.default, x, like=linear, site=site, part=NodeRole.ACTIVATION
        )
    assert grid is not None
    value = x.meta["val"]
    device = editor.program.device
    scale_node = editor.parameter(
        editor.fresh(f"{site}_input_scale"),
        torch.tensor(grid.scale, dtype=value.dtype, device=device),
        frozen=True,
        part=NodeRole.SCALE,
    )
    zero_node = editor.parameter(
        editor.fresh(f"{site}_input_zero"),
        torch.tensor(grid.zero_point, dtype=grid.dtype, device=device),
        frozen=True,
        part=NodeRole.ZERO_POINT,
    )
    return editor.call(
        torch.ops.bmgraph.quantize_static.default, x, scale_node, zero_node, like=linear, site=site, part=NodeRole.ACTIVATION
    )  # fmt: skip
