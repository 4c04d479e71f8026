"""Smooth: move the wide ranges of activation channels into weights, in front of 8-bit rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from bmgraph.analysis.channel_sources import ChannelSource, ChannelSources, factor_of
from bmgraph.analysis.site_filter import matches, resolve_patterns
from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.weight_sites import Weight, linears, product_sites, weight_of
from bmgraph.deltas.backbone import backbone_of
from bmgraph.errors import InputError, PassError
from bmgraph.ir.editor import Editor
from bmgraph.ir.eval_form import in_eval
from bmgraph.ir.evaluation import upstream
from bmgraph.ir.node_role import NodeRole, has_role, is_delta
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import argument, traits_of
from bmgraph.pass_manager.context import CALIBRATION, Context
from bmgraph.pass_manager.pass_base import ModelPass
from bmgraph.utils.digest import fingerprint
from bmgraph.utils.stored_tensor import in_memory

aten = torch.ops.aten

SMOOTHED = "smoothed"
"""Provided by the pass."""

WIDEST = 256.0
"""The largest factor between a scale and the mean of all: no channel is worth more, and half precision holds it."""

BEHIND_NORM = frozenset({Kind.CAST, Kind.DROPOUT, Kind.RESHAPE})
"""Calls between a norm and what reads it, beside products and sums with weights."""


@dataclass(frozen=True, repr=False)
class Smooth(ModelPass):
    """Divide the channels that linears read by scales, and multiply their weights by these, so that channels have like ranges.

    A channel j of the input x of linears with weights W gets the scale max|x_j|^alpha / max|W_j|^(1 - alpha), the maxima of
    x over the calibration batches, those of W over all linears that read x. Outputs stay what they are, up to rounding. What
    gives x takes the division: the weight and bias of a norm that only these linears read, or of another linear, where every
    call in between passes a factor on: from the values of an attention to its output, from the up projection of a gated or
    ReLU feed-forward to the down projection. Elsewhere, behind a norm, x is multiplied by the inverse (`multiply=False` leaves
    such inputs alone).

    alpha: 0 levels the weights, 1 the activations; the default was best on MiniLM, where 0.3 to 0.9 were tried. include,
    exclude: globs over module paths of the linears that read x.

    Linears whose weight is quantized, masked, tied or used several times, those with a delta, and routers keep their input.
    Run it before Quantize and Prune, and after Merge. Source: Xiao et al. 2022, SmoothQuant (arXiv:2211.10438).

    Reads the calibration batches; raises ResourceError without them, PassError where a glob matches nothing or the program has
    no weights (meta device), InputError for an alpha out of range.

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.passes import Smooth
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.Linear(16, 8))
        >>> batch = {"input": torch.randn(4, 16)}
        >>> smooth = bg.Pipeline([Smooth()]).run(bg.capture(model, batch), calibration=[batch])
        >>> [edit.site for edit in smooth.history[-1].edits]
        ['1.weight']
    """

    provides: ClassVar[frozenset[str]] = frozenset({SMOOTHED})
    conflicts: ClassVar[frozenset[str]] = frozenset({"quantized"})
    may_match_nothing: ClassVar[bool] = True

    alpha: float = 0.65
    multiply: bool = True
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha={self.alpha}: give a number from 0 to 1")

    @property
    def resources(self) -> tuple[str, ...]:
        """Calibration batches, on which the maxima of channels are measured."""
        return (CALIBRATION,)

    def run(self, program: Program, context: Context) -> Program:
        """Smooth the inputs of the chosen linears."""
        if program.device.type == "meta":
            raise PassError("a program on the meta device has no values to measure: load its weights first")
        sites = product_sites(program)
        include = resolve_patterns(self.include, sites, "include")
        exclude = resolve_patterns(self.exclude, sites, "exclude")
        inputs = self._plans(program, context, _chosen(program, context, include, exclude))
        peaks = _peaks(program, context, [plan.x for plan in inputs])
        with program.edit(by=str(self)) as editor:
            for plan in inputs:
                self._smooth(editor, context, plan, peaks[in_eval(plan.x).name])
        if inputs:  # a delta that was trained on the weights as they were must be rejected
            program.fingerprint = fingerprint(backbone_of(program))
        return program

    def _plans(
        self, program: Program, context: Context, chosen: Mapping[fx.Node, list[tuple[fx.Node, Weight]]]
    ) -> list[_Plan]:
        """Where the scales of each input can go; inputs for which there is no place are declined."""
        sources, found = ChannelSources(program), []
        for x, readers in chosen.items():
            others = set(x.users) - {linear for linear, _ in readers}
            source = sources.of(x) if not others else f"{min(others).name} reads its input too"
            if isinstance(source, ChannelSource):
                source = _why_fixed(program, source) or source
            if isinstance(source, ChannelSource):
                found.append(_Plan(x, readers, source))
            elif self.multiply and _behind_norm(x):
                found.append(_Plan(x, readers, None))
            else:
                for _, weight in readers:
                    context.declined(weight.site, source)
        return found

    def _smooth(self, editor: Editor, context: Context, plan: _Plan, peaks: torch.Tensor) -> None:
        program = editor.program
        columns = [_largest_of_columns(program, weight) for _, weight in plan.readers]
        width = len(peaks)
        channels = plan.source.channels if plan.source else torch.arange(width)
        scales = _scales(peaks, torch.stack(columns).amax(0), channels, self.alpha)
        tensors = [weight.site for _, weight in plan.readers]
        for _, weight in plan.readers:
            shape = [1, -1] if weight.channel_axis == 0 else [-1, 1]
            _multiply(editor, context, weight.site, scales.reshape(shape))
        if plan.source is None:
            self._divide(editor, plan, scales)
        else:
            whole = torch.ones(int(plan.source.node.meta["val"].shape[-1]), dtype=torch.double)
            whole[channels] = 1 / scales
            tensors += _divide_source(editor, context, plan.source.node, whole)
        context.edited(
            plan.readers[0][1].site,
            f"{width} channels that it reads are scaled by {float(1 / scales.max()):.2g} to {float(1 / scales.min()):.2g}",
            tensors,
        )

    def _divide(self, editor: Editor, plan: _Plan, scales: torch.Tensor) -> None:
        """Multiply the input by the inverse of the scales."""
        first, site = plan.readers[0][0], plan.readers[0][1].site
        value = plan.x.meta["val"]
        factor = editor.parameter(
            editor.fresh(f"{site}_smoothing"),
            (1 / scales).to(value.dtype).to(editor.program.device),
            frozen=True,
            part=NodeRole.SMOOTHING,
        )
        smooth = editor.call(aten.mul.Tensor, plan.x, factor, like=first, site=site, part=NodeRole.SMOOTHING)
        for linear, _ in plan.readers:
            linear.update_arg(0, smooth)


@dataclass(frozen=True)
class _Plan:
    """An input, the linears that read it, and what takes its division; None where it is multiplied."""

    x: fx.Node
    readers: list[tuple[fx.Node, Weight]]
    source: ChannelSource | None


def _chosen(
    program: Program, context: Context, include: Sequence[str], exclude: Sequence[str]
) -> dict[fx.Node, list[tuple[fx.Node, Weight]]]:
    """Input -> the linears to smooth that read it. A value and the same behind dropout are two inputs."""
    roles = find(program).roles
    changed = {node.meta.get("site") for node in program.graph.nodes if is_delta(node)}
    found: dict[fx.Node, list[tuple[fx.Node, Weight]]] = {}
    for linear in linears(program.graph):
        weight = weight_of(program, linear)
        if weight is None or not matches(weight.site, include) or matches(weight.site, exclude):
            continue
        reason = _reason_to_decline(program, weight, roles.get(weight.site, ""))
        if not reason and weight.site in changed:
            reason = "a delta changes it: smooth before the delta is added, or after Merge"
        x = linear.args[0]
        assert isinstance(x, fx.Node)
        if reason:
            context.declined(weight.site, reason)
        else:
            found.setdefault(x, []).append((linear, weight))
    return found


def _reason_to_decline(program: Program, weight: Weight, role: str) -> str:
    """Why a weight cannot take scales; empty where it can."""
    parts = list(upstream(weight.node))
    if any(has_role(part, NodeRole.CODES) for part in parts):
        return "its weight is quantized: smooth before that"
    if any(has_role(part, NodeRole.MASK) for part in parts):
        return "its weight is masked: smooth before Prune"
    if weight.node.op != "get_attr" or weight.site not in program.parameters:
        return "its weight is an expression"
    value = weight.node.meta["val"]
    if not value.is_floating_point() or value.dim() != 2:
        return f"its weight is {value.dtype} of {value.dim()} dimensions"
    if role == "router":
        return "it is a router: rounding alone may change which experts it selects"
    readers = [reader for user in weight.node.users for reader in _past_transpose(user)]
    if any(traits_of(reader).kind is not Kind.LINEAR for reader in readers):
        return "something else reads its weight too (a tied embedding)"
    return "" if len(readers) == 1 else f"its weight is used {len(readers)} times"


def _past_transpose(node: fx.Node) -> list[fx.Node]:
    return list(node.users) if node.target is aten.t.default else [node]


def _why_fixed(program: Program, source: ChannelSource) -> str:
    """Why the weights of a source cannot be divided; empty where they can."""
    node, width = source.node, int(source.node.meta["val"].shape[-1])
    kind = traits_of(node).kind
    if kind is Kind.LINEAR:
        weight = weight_of(program, node)
        reason = "" if weight is None else _reason_to_decline(program, weight, "")
        if weight is None or reason:
            return f"what gives its input cannot be scaled: {reason or 'its weight is an expression'}"
    given = _operands_of_source(node)
    if not given:
        return "the norm in front of it has no weight"
    for item in given:
        plain = item.op == "get_attr" and str(item.target) in program.parameters
        if not plain or len(item.users) != 1:
            return f"{item.target if plain else item.name} in front of it has another reader, or is no plain parameter"
        if kind is not Kind.LINEAR and list(item.meta["val"].shape) != [width]:
            return "the norm in front of it runs over several dimensions"
    return ""


def _operands_of_source(node: fx.Node) -> list[fx.Node]:
    """The weight and bias of a linear or a norm, or the parameter of a product: what is divided."""
    factor = factor_of(node)
    if factor is not None:
        return [factor]
    weight: object = argument(node, "weight")
    if (
        traits_of(node).kind is Kind.LINEAR
        and isinstance(weight, fx.Node)
        and weight.target is aten.t.default
    ):
        weight = weight.args[0]
    found = [weight, argument(node, "bias")] if isinstance(weight, fx.Node) else []
    return [item for item in found if isinstance(item, fx.Node)]


def _behind_norm(x: fx.Node) -> bool:
    """Whether a value is the output of a norm, up to products and sums with weights."""
    node = x
    while traits_of(node).kind is not Kind.NORM:
        kind = traits_of(node).kind
        values = [item for item in node.all_input_nodes if item.op != "get_attr"]
        if kind not in BEHIND_NORM and (kind not in (Kind.SCALING, Kind.SUM) or len(values) != 1):
            return False
        if not values:
            return False
        node = values[0]
    return True


def _peaks(program: Program, context: Context, inputs: Sequence[fx.Node]) -> dict[str, torch.Tensor]:
    """The largest magnitude of each channel over all calibration batches, f64[channels] by node name."""
    found: dict[str, torch.Tensor] = {}

    def visit(name: str, value: torch.Tensor) -> None:
        if not value.numel():
            return
        peak = value.reshape(-1, value.shape[-1]).abs().amax(0).double().cpu()
        found[name] = torch.maximum(found[name], peak) if name in found else peak

    if inputs:
        context.calibrate(program, {in_eval(x).name for x in inputs}, visit)
    widths = {in_eval(x).name: int(x.meta["val"].shape[-1]) for x in inputs}
    return {name: found.get(name, torch.zeros(width, dtype=torch.double)) for name, width in widths.items()}


def _largest_of_columns(program: Program, weight: Weight) -> torch.Tensor:
    """The largest magnitude of a weight for each of its inputs, f64[in]."""
    value = in_memory(program.tensor(weight.site))
    return value.abs().amax(weight.channel_axis).double().cpu()


def _scales(peaks: torch.Tensor, columns: torch.Tensor, channels: torch.Tensor, alpha: float) -> torch.Tensor:
    """f64[in]: the scale of each input, one for those that are the same channel of what gives them; their geometric mean is 1.

    `channels` i64[in]: the channel of the source that each input is.
    """
    width = int(channels.max()) + 1
    rows, weights = (
        torch.zeros(width, dtype=torch.double).scatter_reduce(0, channels, value, "amax")[channels]
        for value in (peaks, columns)
    )
    known = (rows > 0) & (weights > 0)
    logs = torch.where(
        known, alpha * rows.clamp(min=1e-300).log() - (1 - alpha) * weights.clamp(min=1e-300).log(), 0.0
    )
    mean = logs[known].mean() if bool(known.any()) else logs.new_zeros(())
    return torch.where(known, (logs - mean).exp().clamp(1 / WIDEST, WIDEST), 1.0)


def _divide_source(editor: Editor, context: Context, node: fx.Node, factors: torch.Tensor) -> list[str]:
    """Multiply the outputs of a linear, a norm or a product by factors of its channels; returns the tensors that change."""
    changed = []
    for item in _operands_of_source(node):
        name, value = str(item.target), item.meta["val"]
        transposed = value.dim() == 2 and next(iter(item.users)).target is aten.t.default
        by_row = value.dim() == 2 and not transposed
        _multiply(editor, context, name, factors.reshape([-1, 1]) if by_row else factors)
        changed.append(name)
    return changed


def _multiply(editor: Editor, context: Context, name: str, factors: torch.Tensor) -> None:
    """Multiply a parameter by factors that broadcast."""
    value = in_memory(editor.program.tensor(name))
    factors = factors.to(value.device)
    editor.assign(name, (value.double() * factors).to(value.dtype))
    context.rescaled(name, factors)
