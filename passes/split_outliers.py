"""SplitOutliers: a feed-forward neuron that grows too large is shared out over several that do not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.weight_sites import Weight, linears, weight_of
from bmgraph.errors import InputError
from bmgraph.ir.editor import Editor
from bmgraph.ir.eval_form import DROPOUTS, in_eval
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, Pass

aten = torch.ops.aten

LINEAR_FAR_OUT = (aten.gelu.default, aten.relu.default, aten.silu.default)
"""Activations with f(h) = h for large h and f(h) = 0 for very negative h: min(f(h), c) + f(h - c) is nearly f(h)."""

CODES = 255
"""Steps of an 8-bit code."""

MARGIN = 1.05
"""How far a neuron may pass the limit before it gets a copy."""


@dataclass(frozen=True, repr=False)
class SplitOutliers(Pass):
    """Give the few channels that need a wide range copies that do not, so that 8 bits are spent where most values are.

    What enters a linear is clamped to a narrow range [lo, hi], and a channel that leaves it gets copies shifted by one,
    two, ... widths: v = clamp(v) + (clamp(v - width) - lo) + ..., which is exact; the constants go into the bias.

    Behind a plain feed-forward's activation f the copies are neurons of their own, and cost next to nothing: f is the
    identity far out, so f(h) = min(f(h), c) + min(f(h - c), c) + ...: exact for ReLU, within 0.17 for GELU near h = c and
    0.28 for SiLU. Here c is at least `least`.

    At most `share` of the channels are copied. Neurons are where the range shrinks to `worth` of what it was; other
    channels, whose copies cost time, where rounding to 8 bits would add more than `noise` (relative to their root mean
    square), and as few as bring it to half of that.
    """

    effect: ClassVar[Effect] = "approximate"
    default_drift: ClassVar[float] = 0.05
    may_match_nothing: ClassVar[bool] = True

    share: float = 0.02
    least: float = 4.0
    worth: float = 0.6
    noise: float = 0.04

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("share", "worth"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: give a share between 0 and 1")
        for name in ("least", "noise"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name}={getattr(self, name)}: give a number above 0")

    @property
    def resources(self) -> tuple[str, ...]:
        """The batches on which channels are measured."""
        return ("calibration",)

    def run(self, program: Program, context: Context) -> Program:
        """Split the channels that stand out, wherever a linear reads them."""
        forwards = [site for node in program.graph.nodes if (site := _feedforward(program, node)) is not None]
        readers = _readers(program, {site.down for site in forwards})
        seen: dict[str, _Seen] = {}

        def visit(name: str, value: torch.Tensor) -> None:
            seen.setdefault(name, _Seen(value)).add(value)

        context.calibrate(
            program, {*(site.activation.name for site in forwards), *(x.name for x in readers)}, visit
        )
        with program.edit(by=str(self)) as editor:
            for site in forwards:
                self._neurons(editor, context, site, seen[site.activation.name].high)
        with program.edit(by=str(self)) as editor:
            for x, linears_of_x in _readers(program, set()).items():
                if x.name in seen and x.target not in LINEAR_FAR_OUT:
                    self._channels(editor, context, x, linears_of_x, seen[x.name])
        return program

    def _neurons(self, editor: Editor, context: Context, site: _FeedForward, largest: torch.Tensor) -> None:
        peaks = largest.double()
        margin = 1.0 if site.activation.target is aten.relu.default else MARGIN
        allowed = max(1, int(self.share * len(peaks)))
        limit = self.least
        while len(copies := _copies(peaks, limit, margin)) > allowed:
            limit *= 1.1
        if not copies or limit > self.worth * float(peaks.max()):
            context.declined(site.up_weight.site, "no neuron stands out")
            return
        _split(editor, site, limit, copies)
        context.edited(
            site.up_weight.site, f"{len(copies)} shifted copies of neurons, clamped at {limit:.3g}"
        )

    def _channels(
        self,
        editor: Editor,
        context: Context,
        x: fx.Node,
        linears_of_x: list[tuple[fx.Node, Weight]],
        seen: _Seen,
    ) -> None:
        step = CODES * math.sqrt(12) * seen.rms  # a range of this width is rounded with a relative noise of 1
        plan = None
        if seen.width > self.noise * step:
            plan = _narrow(seen, max(1, int(self.share * len(seen.low))), 0.5 * self.noise * step)
        if plan is None:
            context.declined(linears_of_x[0][1].site, "no channel that it reads stands out")
            return
        _widen(editor, x, linears_of_x, plan)
        context.edited(
            linears_of_x[0][1].site,
            f"{len(plan.channels)} shifted copies of the channels it reads, in {plan.low:.3g} to {plan.high:.3g}",
        )


@dataclass(frozen=True)
class _Narrow:
    """A range, and for every copy its channel, what is subtracted from it, and the value that stands for nothing."""

    low: float
    high: float
    channels: tuple[int, ...]
    shifts: tuple[float, ...]
    rests: tuple[float, ...]


class _Seen:
    """What was seen of the channels of a tensor."""

    def __init__(self, value: torch.Tensor) -> None:
        self.low = torch.zeros(value.shape[-1], dtype=torch.double, device=value.device)
        self.high = torch.zeros_like(self.low)
        self._squares, self._count = 0.0, 0

    def add(self, value: torch.Tensor) -> None:
        """Look at a value [..., channels]."""
        rows = value.reshape(-1, value.shape[-1])
        self.low = torch.minimum(self.low, rows.amin(0).double())
        self.high = torch.maximum(self.high, rows.amax(0).double())
        self._squares += float(rows.double().square().sum())
        self._count += rows.numel()

    @property
    def rms(self) -> float:
        """Root mean square over all channels."""
        return math.sqrt(self._squares / max(1, self._count))

    @property
    def width(self) -> float:
        """The range of all channels together, with 0 in it."""
        return float(self.high.max() - self.low.min())


def _narrow(seen: _Seen, allowed: int, wanted: float) -> _Narrow | None:
    """The range that needs the fewest copies to be no wider than `wanted`; failing that the narrowest one that needs at
    most `allowed`; None where none is narrower."""
    best: tuple[tuple[float, float], float, float] | None = None
    for top in dict.fromkeys(seen.high.sort(descending=True).values[: allowed + 1].tolist()):
        for bottom in dict.fromkeys(seen.low.sort().values[: allowed + 1].tolist()):
            span = top - bottom
            if not 0 < span < seen.width:
                continue
            copies = int(
                (
                    ((seen.high - top) / span).ceil().clamp(min=0)
                    + ((bottom - seen.low) / span).ceil().clamp(min=0)
                ).sum()
            )
            if copies > allowed:
                continue
            rank = (0.0, copies) if span <= wanted else (span, 0.0)
            if best is None or rank < best[0]:
                best = (rank, bottom, top)
    if best is None:
        return None
    _, bottom, top = best
    span = top - bottom
    channels, shifts, rests = [], [], []
    for excess, sign, rest in ((seen.high - top, 1.0, bottom), (bottom - seen.low, -1.0, top)):
        for channel in (excess > 0).nonzero().flatten().tolist():
            for k in range(1, math.ceil(float(excess[channel]) / span) + 1):
                channels.append(channel)
                shifts.append(sign * k * span)
                rests.append(rest)
    return _Narrow(bottom, top, tuple(channels), tuple(shifts), tuple(rests))


def _readers(program: Program, apart: set[fx.Node]) -> dict[fx.Node, list[tuple[fx.Node, Weight]]]:
    """What linears with plain weights of their own read -> those linears; `apart` are left out."""
    found: dict[fx.Node, list[tuple[fx.Node, Weight]]] = {}
    for linear in linears(program.graph):
        weight = weight_of(program, linear)
        if linear in apart or weight is None or not _alone(weight):
            continue
        source = linear.args[0]
        assert isinstance(source, fx.Node)
        found.setdefault(in_eval(source), []).append((linear, weight))
    return found


def _widen(editor: Editor, x: fx.Node, linears_of_x: list[tuple[fx.Node, Weight]], plan: _Narrow) -> None:
    """Let linears read the clamped channels and the clamped copies beside them."""
    program, first = editor.program, linears_of_x[0][0]
    site = linears_of_x[0][1].site
    value = x.meta["val"]
    channels = torch.tensor(plan.channels, device=program.device)
    shifts = torch.tensor(plan.shifts, dtype=value.dtype, device=program.device)
    index = editor.parameter(editor.fresh(f"{site}_outliers"), channels, frozen=True, part="channels")
    shift = editor.parameter(editor.fresh(f"{site}_shifts"), shifts, frozen=True, part="shift")
    source = first.args[0]
    copies = editor.call(aten.index_select.default, source, -1, index, like=first, site=site, part="copies")
    moved = editor.call(aten.sub.Tensor, copies, shift, like=first, site=site, part="copies")
    narrow = [
        editor.call(aten.clamp.default, item, plan.low, plan.high, like=first, site=site, part="clamp")
        for item in (source, moved)
    ]
    wide = editor.call(aten.cat.default, narrow, -1, like=first, site=site, part="copies")
    rests = torch.tensor(plan.rests, dtype=value.dtype, device=program.device)
    for linear, weight in linears_of_x:
        matrix = program.tensor(weight.site)
        axis = 1 - weight.channel_axis
        chosen = matrix.index_select(axis, channels)
        constant = (chosen @ rests) if axis == 1 else (rests @ chosen)
        bias = linear.args[2] if len(linear.args) > 2 else None
        editor.assign(weight.site, torch.cat([matrix, chosen], axis))
        reader = _lower_bias(editor, weight, bias, constant)
        stored = editor.read(weight.site)
        holder = editor.call(aten.t.default, stored, like=linear) if weight.transposed else stored
        new = editor.call(aten.linear.default, wide, holder, reader, like=linear)
        editor.replace(linear, new)


def _lower_bias(editor: Editor, weight: Weight, bias: object, constant: torch.Tensor) -> fx.Node:
    """The bias of a linear, less what its copies add when they say nothing."""
    if isinstance(bias, fx.Node) and bias.op == "get_attr" and len(bias.users) == 1:
        return editor.assign(str(bias.target), editor.program.tensor(str(bias.target)) - constant)
    if isinstance(bias, fx.Node):
        constant = evaluate(editor.program, bias) - constant
    else:
        constant = -constant
    return editor.parameter(editor.fresh(f"{weight.site}_bias"), constant, like=weight.node, part="bias")


def _copies(peaks: torch.Tensor, limit: float, margin: float) -> list[tuple[int, int]]:
    """(neuron, k) for every copy shifted by k limits; a neuron may pass its last limit by a share of `margin`."""
    return [
        (neuron, shift)
        for neuron in (peaks > margin * limit).nonzero().flatten().tolist()
        for shift in range(1, math.ceil(float(peaks[neuron]) / (margin * limit)))
    ]


@dataclass(frozen=True)
class _FeedForward:
    up: fx.Node
    activation: fx.Node
    down: fx.Node
    up_weight: Weight
    down_weight: Weight


def _feedforward(program: Program, activation: fx.Node) -> _FeedForward | None:
    """linear -> activation -> linear, with plain weights and nothing else reading between them."""
    if activation.op != "call_function" or activation.target not in LINEAR_FAR_OUT:
        return None
    up = activation.args[0]
    if not isinstance(up, fx.Node) or up.target is not aten.linear.default or len(up.users) != 1:
        return None
    last = activation
    while len(last.users) == 1 and next(iter(last.users)).target in DROPOUTS:
        last = next(iter(last.users))
    if len(last.users) != 1:
        return None
    down = next(iter(last.users))
    if down.target is not aten.linear.default or down.args[0] is not last:
        return None
    first, second = weight_of(program, up), weight_of(program, down)
    if first is None or second is None or not (_alone(first) and _alone(second)):
        return None
    return _FeedForward(up, activation, down, first, second)


def _alone(weight: Weight) -> bool:
    """Whether a weight is a plain parameter that one linear reads."""
    return weight.node.op == "get_attr" and len(weight.node.users) == 1


def _split(editor: Editor, site: _FeedForward, limit: float, copies: list[tuple[int, int]]) -> None:
    program = editor.program
    neurons = torch.tensor([neuron for neuron, _ in copies], device=program.device)
    shifts = torch.tensor([float(shift) for _, shift in copies]) * limit
    up, down = program.tensor(site.up_weight.site), program.tensor(site.down_weight.site)
    bias = site.up.args[2] if len(site.up.args) > 2 else None
    old = (
        program.tensor(str(bias.target))
        if isinstance(bias, fx.Node)
        else up.new_zeros(up.shape[site.up_weight.channel_axis])
    )
    _grow(editor, site.up_weight, up, neurons, site.up_weight.channel_axis)
    _grow(editor, site.down_weight, down, neurons, 1 - site.down_weight.channel_axis)
    shifted = torch.cat([old, old[neurons] - shifts.to(old)])
    name = (
        str(bias.target) if isinstance(bias, fx.Node) else site.up_weight.site.removesuffix("weight") + "bias"
    )
    reader = (
        editor.assign(name, shifted)
        if isinstance(bias, fx.Node)
        else editor.parameter(name, shifted, part="bias")
    )
    sums = editor.call(aten.linear.default, site.up.args[0], site.up.args[1], reader, like=site.up)
    call: Any = site.activation.target
    options: dict[str, Any] = dict(site.activation.kwargs)
    active = editor.call(call, sums, *site.activation.args[1:], like=site.activation, **options)
    clamped = editor.call(
        aten.clamp.default, active, None, limit, like=site.activation, site=site.up_weight.site, part="clamp"
    )
    site.activation.replace_all_uses_with(clamped)
    fresh = editor.call(aten.linear.default, clamped, *site.down.args[1:], like=site.down)
    site.down.replace_all_uses_with(fresh)


def _grow(editor: Editor, weight: Weight, value: torch.Tensor, neurons: torch.Tensor, axis: int) -> None:
    """Repeat the rows or columns of some neurons at the end of a weight."""
    editor.assign(weight.site, torch.cat([value, value.index_select(axis, neurons)], axis))
