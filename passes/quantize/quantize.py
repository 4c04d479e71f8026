"""Quantize: weights of linears, experts and embeddings as integer codes, and rounded activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
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
from bmgraph.ir.evaluation import upstream
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import CALIBRATION, Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.pass_manager.target import Target
from bmgraph.passes.quantize.block_codes import BLOCKS, BlockCodes
from bmgraph.passes.quantize.layerwise import LayerwiseQuantization
from bmgraph.passes.quantize.lookups import embedding_sites, quantize_lookups
from bmgraph.passes.quantize.round_inputs import InputRounding, expert_blocks, input_ranges
from bmgraph.passes.quantize.schemes import METHODS, SCHEMES
from bmgraph.passes.quantize.weight_format import WeightFormat
from bmgraph.passes.smooth import SMOOTHED, Smooth
from bmgraph.passes.split_outliers import SplitOutliers
from bmgraph.verify.measures import Measure, OutputsMoved, WeightsMoved
from bmgraph.verify.site_outputs import SiteOutputErrors

ACTIVATIONS = (None, "static", "dynamic", "none", "blocks")

EMBEDDINGS = (8, 4)
"""Bits that rows of embeddings may have."""

MEASURED_BATCHES = 2
"""Number of calibration batches on which the drift of a site is measured."""

ONE_BATCH = 1.5
"""How many times more the output of a site may move on one batch than `site_drift` allows on all."""


@dataclass(frozen=True, repr=False)
class Quantize(ModelPass):
    """Store the weights of linears as integer codes and round activations.

    scheme: "int8", s8 codes with one scale for each output channel, or "int4", codes with one scale for each `group` of
    16 to 256 inputs of an output, two in a byte, for decoders whose time goes into reading weights. method: how codes are
    chosen: "rtn" takes the nearest; "gptq" (int4) lets what one column of a weight loses be made up for by the others, layer
    after layer, on calibration data: larger groups, which run faster, need it.

    activations: "static" rounds the input of a linear to u8 with a scale measured on the calibration batches (to s8 around 0
    where the target is symmetric), "dynamic" with a scale measured at each call over the whole tensor, "none" leaves it in
    floating point; the default is the best mode that the target supports: static with calibration, else dynamic, else none.
    For int4 it is "blocks", each group of inputs rounded to s8 with a scale of its own, where the target's kernel does so
    (ONNX Runtime), else "none".

    embeddings: bits (8 or 4) of the rows of embeddings, in groups, too; by default they stay as they are. A head that is tied
    to an embedding is quantized where that is: each then has codes of its own. include, exclude: globs over module paths.
    site_drift: a site whose output changes by more (relative L2, on calibration batches) is declined; by default 0.1 for
    int8, 0.5 for int4. outliers: with static scales, run `SplitOutliers` first. smooth: run `Smooth` before that, unless it has
    run; by default where the target gains by it and scales are static.

    The weight stays an expression in front of `aten.linear`, so that later passes find the site. Weights that another
    operator reads too (tied embeddings), weights with a side below `smallest`, routers and, for int4, experts are declined.

    Raises PassError where a glob matches nothing, no site is left or the target has no kernel for such codes, ResourceError
    where static scales or gptq have no calibration. Sources: Jacob et al. 2018 (affine quantization), Krishnamoorthi 2018
    (per-channel weights), Frantar et al. 2022 (GPTQ, arXiv:2210.17323).

    Example:
        >>> from bmgraph.passes import Quantize
        >>> Quantize("int8", exclude=("*.pooler.*",))
        quantize{exclude=[*.pooler.*]}
        >>> Quantize("int4", method="gptq", group=128)
        quantize{scheme=int4,method=gptq,group=128}
    """

    effect: ClassVar[Effect] = "approximate"
    provides: ClassVar[frozenset[str]] = frozenset({"quantized"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"quantized"})
    default_drift: ClassVar[float] = 0.3
    version: ClassVar[int] = 2
    former_defaults: ClassVar[Mapping[int, Mapping[str, object]]] = MappingProxyType({1: {"smooth": False}})

    scheme: str = field(default="int8")
    activations: str | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    site_drift: float | None = None
    outliers: bool = True
    smallest: int = 16
    method: str = field(default="rtn", kw_only=True)
    group: int = field(default=32, kw_only=True)
    embeddings: int | None = field(default=None, kw_only=True)
    smooth: bool | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scheme not in SCHEMES:
            raise InputError(f"scheme={self.scheme!r}: choose one of {', '.join(SCHEMES)}")
        if self.activations not in ACTIVATIONS:
            raise InputError(f"activations={self.activations!r}: choose static, dynamic, none or blocks")
        modes = self._format(False).activation_modes
        if self.activations is not None and self.activations not in modes:
            raise InputError(f"activations={self.activations!r}: {self.scheme} takes {' or '.join(modes)}")
        methods = SCHEMES[self.scheme].methods
        if self.method not in methods:
            known = (
                f"{self.scheme} has {' and '.join(methods)}"
                if self.method in METHODS
                else f"choose one of {', '.join(METHODS)}"
            )
            raise InputError(f"method={self.method!r}: {known}")
        if self.group not in BLOCKS:
            raise InputError(f"group={self.group}: kernels have groups of {', '.join(map(str, BLOCKS))}")
        if self.embeddings is not None and self.embeddings not in EMBEDDINGS:
            raise InputError(f"embeddings={self.embeddings}: give the bits of a code, 8 or 4")
        if self.site_drift is not None and not self.site_drift > 0:
            raise InputError(f"site_drift={self.site_drift}: give a bound above 0")
        if self.smooth and self.activations == "none":
            raise InputError("smooth=True with activations='none': nothing rounds what it would smooth")

    def _format(self, positive: bool) -> WeightFormat:
        """The format of the codes; `positive`: scales must be."""
        return SCHEMES[self.scheme].format(self.group, positive)

    @property
    def allowed_drift(self) -> float:
        """As much as codes of their number of bits need."""
        return self._format(False).drift

    @property
    def _site_drift(self) -> float:
        return self._format(False).site_drift if self.site_drift is None else self.site_drift

    @property
    def measured(self) -> Measure:
        """The weights bound codes that are the nearest ones; the outputs of their sites those that are calibrated."""
        if METHODS[self.method].choose is not None:
            return OutputsMoved(ONE_BATCH * self._site_drift)
        return WeightsMoved(self._format(False).weight_bound)

    @property
    def resources(self) -> tuple[str, ...]:
        """Calibration batches, for static scales, smoothing and methods that calibrate."""
        calibrates = METHODS[self.method].choose is not None
        return (CALIBRATION,) if self.activations == "static" or self.smooth or calibrates else ()

    def run(self, program: Program, context: Context) -> Program:
        """Quantize the selected linears, experts and embeddings."""
        sites = [*product_sites(program), *(embedding_sites(program) if self.embeddings else ())]
        include = resolve_patterns(self.include, sites, "include")
        exclude = resolve_patterns(self.exclude, sites, "exclude")
        target = context.target
        form = self._format(target.positive_scales)
        calibrated = context.has(CALIBRATION) and program.device.type != "meta"
        mode = self._mode(form, target, calibrated)
        self._check_target(form, mode, target)
        if METHODS[self.method].choose is not None and program.device.type == "meta":
            raise PassError(
                f"{self.method} measures, and a program on the meta device has no values: give it weights first"
            )
        if self._smooths(program, target, mode):
            program = context.run(Smooth(include=include, exclude=exclude), program)
        if mode == "static" and self.outliers:
            program = context.run(SplitOutliers(include=include, exclude=exclude), program)
        if self.embeddings:
            rows = BlockCodes(self.embeddings, self.group, target.positive_scales)
            quantize_lookups(
                program,
                context,
                rows,
                include,
                exclude,
                self.smallest,
                f"{self.embeddings}-bit rows",
                str(self),
            )
        chosen = self._choose(program, context, form, include, exclude)
        rounding = self._rounding(program, context, chosen, form, mode)
        what = f"{self.scheme} weight" + (f", {mode} activation" if mode != "none" else "")
        choose = METHODS[self.method].choose
        if choose is not None:
            assert isinstance(form, BlockCodes)
            LayerwiseQuantization(
                program, context, form, choose, {weight.site for _, weight in chosen}, self._site_drift,
                f"{what} by {self.method}", str(self), rounding,
            ).run()  # fmt: skip
            return program
        if calibrated:
            chosen = self._within_drift(program, context, form, chosen, rounding)
        with program.edit(by=str(self)) as editor:
            for linear, weight in chosen:
                self._quantize_weight(editor, form, weight)
                rounding.apply(editor, linear, weight.site)
            for site in dict.fromkeys(weight.site for _, weight in chosen):
                context.edited(site, what)
        return program

    def _smooths(self, program: Program, target: Target, mode: str) -> bool:
        """Whether to smooth first: as asked, else where the target gains by it; once is enough."""
        wanted = target.smooth and mode == "static" if self.smooth is None else self.smooth
        return wanted and not any(SMOOTHED in record.provides for record in program.history)

    def _check_target(self, form: WeightFormat, mode: str, target: Target) -> None:
        """Raise PassError for what a target does not take, ResourceError where a method has nothing to measure on."""
        if mode not in target.activation_modes:
            raise PassError(
                f"{target.name} takes {', '.join(target.activation_modes)} activations, not {mode}"
            )
        for granularity in dict.fromkeys((form.granularity, *(["block"] if self.embeddings else []))):
            if granularity not in target.weight_scales:
                raise PassError(f"{target.name} takes no weights with one scale for each {granularity}")

    def _mode(self, form: WeightFormat, target: Target, calibrated: bool) -> str:
        """How activations are rounded: as asked, else the best mode of the format or, where that has no order, of the target,
        with what was given."""
        if self.activations is not None:
            return self.activations
        for mode in form.preferred_modes or target.activation_modes:
            if mode in target.activation_modes and (calibrated or mode != "static"):
                return mode
        raise ResourceError(
            f"{target.name} takes static activations only, whose scales are measured: pass calibration batches"
        )

    def _rounding(
        self,
        program: Program,
        context: Context,
        chosen: Sequence[tuple[fx.Node, Weight]],
        form: WeightFormat,
        mode: str,
    ) -> InputRounding:
        """How the inputs of the chosen products are rounded."""
        if mode == "none":
            return InputRounding(mode)
        grids = {}
        if mode == "static" and chosen:
            ranges = input_ranges(program, context, chosen)
            grids = {name: seen.grid(context.target.symmetric) for name, seen in ranges.items()}
        if mode == "blocks":
            return InputRounding(mode, grids, {linear: form.input_block for linear, _ in chosen})
        return InputRounding(mode, grids, expert_blocks(chosen, context.target.expert_blocks))

    def _choose(
        self,
        program: Program,
        context: Context,
        form: WeightFormat,
        include: Sequence[str],
        exclude: Sequence[str],
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
            reason = self._reason_to_decline(weight, form, roles.get(weight.site, ""))
            if len(axes[weight.site]) > 1:
                reason = "its outputs lie along one axis in one use and along the other in another"
            if reason:
                declined[weight.site] = reason
            else:
                chosen.append((linear, weight))
        for site, reason in declined.items():
            context.declined(site, reason)
        return chosen

    def _reason_to_decline(self, weight: Weight, form: WeightFormat, role: str) -> str:
        """Why a weight cannot be quantized; empty where it can."""
        value = weight.node.meta["val"]
        if not value.is_floating_point() or value.dim() not in (2, 3):
            return f"its weight is {value.dtype} of {value.dim()} dimensions"
        if value.dim() == 3 and not form.takes_experts:
            return f"no kernel takes experts in {self.scheme} codes"
        if role == "router":
            return "it is a router: rounding its weight would change which experts it selects"
        rows, columns = (size * (value.shape[0] if value.dim() == 3 else 1) for size in value.shape[-2:])
        if min(rows, columns) < self.smallest:
            return f"its weight is only {rows} x {columns}, below smallest={self.smallest}"
        if METHODS[self.method].choose is not None and _is_masked(weight.node):
            return f"its weight is masked, and {self.method} would fill the zeros: use the method rtn, or prune afterwards"
        if read_elsewhere(weight):
            return "something else reads its weight too (a tied embedding)" + (
                "" if self.embeddings or form.takes_experts else ": embeddings=8 quantizes both"
            )
        return ""

    def codes(self, weight: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest codes of a weight whose outputs lie along `axis`, and their scales."""
        return self._format(False).encode(weight, axis)

    def rounded(self, weight: torch.Tensor, axis: int) -> torch.Tensor:
        """The weight that its nearest codes stand for."""
        form = self._format(False)
        return form.decode(*form.encode(weight, axis), weight.shape, axis)

    def _within_drift(
        self,
        program: Program,
        context: Context,
        form: WeightFormat,
        sites: list[tuple[fx.Node, Weight]],
        rounding: InputRounding,
    ) -> list[tuple[fx.Node, Weight]]:
        """The sites whose output changes by at most `site_drift` on calibration data; the others are declined.

        A weight that is used several times stays as it is for all uses where one of them changes by more.
        """
        known: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # the program will hold as many bytes

        def replace(
            linear: fx.Node, weight: Weight, x: torch.Tensor, value: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            axis = weight.channel_axis
            if weight.site not in known:
                known[weight.site] = form.encode(value, axis)
            return rounding.value(linear, x), form.decode(*known[weight.site], value.shape, axis)

        outputs = SiteOutputErrors(program, sites, replace)
        context.calibrate(program, outputs.names, outputs.visit, MEASURED_BATCHES)
        worst = outputs.errors
        for site, error in worst.items():
            if not error <= self._site_drift:
                context.declined(
                    site,
                    f"its output would change by {error:.3f} (relative), more than site_drift={self._site_drift:g}",
                )
        return [
            (linear, weight) for linear, weight in sites if worst.get(weight.site, 0.0) <= self._site_drift
        ]

    def _quantize_weight(self, editor: Editor, form: WeightFormat, weight: Weight) -> None:
        if f"{weight.site}_codes" in editor.program.parameters:
            return
        codes, scale = form.encode(evaluate(editor.program, weight.node), weight.channel_axis)
        made = form.place(editor, weight, codes, scale, min(weight.node.users), weight.site)
        weight.node.replace_all_uses_with(made)


def _is_masked(node: fx.Node) -> bool:
    """Whether a weight is an expression with a boolean mask."""
    return any(item.op == "get_attr" and item.meta["val"].dtype == torch.bool for item in upstream(node))
