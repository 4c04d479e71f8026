"""SplitOutliers: narrow activation ranges before quantization by splitting outlier channels into shifted copies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate, read_by
from bmgraph.analysis.site_filter import check_patterns, matches
from bmgraph.analysis.weight_sites import Weight, linears, product_sites, weight_of
from bmgraph.errors import InputError
from bmgraph.ir.editor import Editor
from bmgraph.ir.eval_form import in_eval
from bmgraph.ir.node_role import NodeRole
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.utils.share import share_of
from bmgraph.verify.kept_calls import check_kept_calls
from bmgraph.verify.proof import Proof

aten = torch.ops.aten

CODES = 255
"""Number of steps of an 8-bit code."""

MARGIN = 1.05
"""Factor by which a neuron may exceed the limit before it gets a copy, where the activation is not ReLU."""


@dataclass(frozen=True, repr=False)
class SplitOutliers(ModelPass):
    """Split the few channels with a wide range into clamped copies, so that the 8-bit codes cover a narrow range.

    The input of a linear is clamped to a narrow range [lo, hi]. A channel that exceeds it gets copies shifted by 1, 2,
    ... widths: v = clamp(v) + (clamp(v - width) - lo) + ..., which is exact; the constants go into the bias.

    In a plain feed-forward, linear -> activation f -> linear, the copies are additional neurons and cost almost nothing:
    f(h) = min(f(h), c) + min(f(h - c), c) + ... holds exactly for ReLU, within 0.17 for GELU near h = c and within 0.28
    for SiLU.

    share: the largest share of channels that may be copied. least: the lower bound of c. worth: neurons are split only
    where their range shrinks to at most this share. noise: other channels, whose copies cost time, are split only where
    rounding to 8 bits would add more noise than this (relative to their root mean square), and only as many as bring the
    noise to half of it. include, exclude: globs over module paths of linears; a feed-forward is split where both of its
    linears are chosen.

    Reads the calibration batches; raises ResourceError without them, PassError where a glob matches nothing and
    InputError for an option out of range.
    """

    effect: ClassVar[Effect] = "approximate"
    default_drift: ClassVar[float] = 0.05
    may_match_nothing: ClassVar[bool] = True

    share: float = 0.02
    least: float = 4.0
    worth: float = 0.6
    noise: float = 0.04
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

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
        """Calibration batches, on which the ranges of channels are measured."""
        return ("calibration",)

    def run(self, program: Program, context: Context) -> Program:
        """Split the outlier neurons of feed-forwards, then the outlier channels that other linears read."""
        check_patterns((*self.include, *self.exclude), product_sites(program), "include or exclude")
        feedforwards = [
            found
            for node in program.graph.nodes
            if (found := _feedforward(program, node)) is not None
            and self._chosen(found.up_weight)
            and self._chosen(found.down_weight)
        ]
        inputs = self._inputs_of_linears(program, {found.down for found in feedforwards})
        names = {*(found.activation.name for found in feedforwards), *(in_eval(x).name for x in inputs)}

        def observed() -> dict[str, tuple[torch.Tensor, torch.Tensor, float, int]]:
            found: dict[str, _ChannelRanges] = {}
            context.calibrate(
                program,
                names,
                lambda name, value: found.setdefault(name, _ChannelRanges.none(value)).add(value),
            )
            return {name: (item.low, item.high, item.squares, item.count) for name, item in found.items()}

        kept = context.kept("ranges of channels", observed)
        ranges = {name: _ChannelRanges(*found) for name, found in kept.items()}
        with program.edit(by=str(self)) as editor:
            for feedforward in feedforwards:
                self._split_neurons(editor, context, feedforward, ranges[feedforward.activation.name].high)
        with program.edit(by=str(self)) as editor:
            for x, linears_of_x in self._inputs_of_linears(program, set()).items():
                measured = in_eval(x)
                if measured.name in ranges and not traits_of(measured).relu_like:
                    self._split_channels(editor, context, x, linears_of_x, ranges[measured.name])
        return program

    def prove(self, before: Program, after: Program, proof: Proof, context: Context) -> None:
        """Around the copies, every call must be what it was."""
        check_kept_calls(before, after, str(self))

    def _chosen(self, weight: Weight) -> bool:
        return matches(weight.site, self.include) and not matches(weight.site, self.exclude)

    def _inputs_of_linears(
        self, program: Program, without: set[fx.Node]
    ) -> dict[fx.Node, list[tuple[fx.Node, Weight]]]:
        """Input node -> the chosen linears that read it and whose weight has no other reader, except `without`.

        A value and the same value behind dropout are two inputs, since they differ in training.
        """
        found: dict[fx.Node, list[tuple[fx.Node, Weight]]] = {}
        for linear in linears(program.graph):
            weight = weight_of(program, linear)
            if linear in without or weight is None or not _has_one_reader(weight) or not self._chosen(weight):
                continue
            source = linear.args[0]
            assert isinstance(source, fx.Node)
            found.setdefault(source, []).append((linear, weight))
        return found

    def _split_neurons(
        self, editor: Editor, context: Context, feedforward: _FeedForward, high: torch.Tensor
    ) -> None:
        """Split the neurons whose peak `high` [neurons] exceeds a limit, the lowest that needs few enough copies."""
        peaks = high.double()
        margin = 1.0 if feedforward.activation.target is aten.relu.default else MARGIN
        allowed = max(1, share_of(self.share, len(peaks)))
        limit = self.least
        while (count := float(_copy_counts(peaks, limit, margin).sum())) > allowed:
            limit *= 1.1
        if not count or limit > self.worth * float(peaks.max()):
            context.declined(feedforward.up_weight.site, "it has no outlier neurons")
            return
        copies = _copies(peaks, limit, margin)
        tensors = read_by([feedforward.up, feedforward.down])
        padding = -(len(peaks) + len(copies)) % context.target.neurons
        _add_neurons(editor, feedforward, limit, copies, padding)
        context.edited(
            feedforward.up_weight.site,
            f"{len(copies)} shifted copies of neurons, clamped at {limit:.3g}",
            tensors,
        )

    def _split_channels(
        self,
        editor: Editor,
        context: Context,
        x: fx.Node,
        linears_of_x: list[tuple[fx.Node, Weight]],
        ranges: _ChannelRanges,
    ) -> None:
        """Split the outlier channels of `x` where 8-bit rounding would be too noisy, for all linears that read it."""
        full_noise = (
            CODES * math.sqrt(12) * ranges.rms
        )  # rounding a range of this width has a relative noise of 1
        plan = None
        if ranges.width > self.noise * full_noise:
            allowed = max(1, share_of(self.share, len(ranges.low)))
            plan = _plan_split(ranges, allowed, 0.5 * self.noise * full_noise)
        if plan is None:
            context.declined(linears_of_x[0][1].site, "its input has no outlier channels")
            return
        tensors = read_by(linear for linear, _ in linears_of_x)
        _add_channels(editor, x, linears_of_x, plan)
        context.edited(
            linears_of_x[0][1].site,
            f"{len(plan.channels)} shifted copies of its input channels, in {plan.low:.3g} to {plan.high:.3g}",
            tensors,
        )


@dataclass(frozen=True)
class _SplitPlan:
    """The range to clamp to, and for each copy its channel, its shift and its idle value.

    A copy is `clamp(channel - shift)`. It has the idle value, `low` or `high`, wherever the channel is within the range.
    """

    low: float
    high: float
    channels: tuple[int, ...]
    shifts: tuple[float, ...]
    idle: tuple[float, ...]


@dataclass
class _ChannelRanges:
    """The observed range of each channel of a tensor (0 included), the sum of the squares of all, and how many there are."""

    low: torch.Tensor
    high: torch.Tensor
    squares: float
    count: int

    @staticmethod
    def none(value: torch.Tensor) -> _ChannelRanges:
        """Those of no value yet, for values like one [..., channels]."""
        low = torch.zeros(value.shape[-1], dtype=torch.double, device=value.device)
        return _ChannelRanges(low, torch.zeros_like(low), 0.0, 0)

    def add(self, value: torch.Tensor) -> None:
        """Observe a value [..., channels]."""
        rows = value.reshape(-1, value.shape[-1])
        self.low = torch.minimum(self.low, rows.amin(0).double())
        self.high = torch.maximum(self.high, rows.amax(0).double())
        self.squares += float(torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2
        self.count += rows.numel()

    @property
    def rms(self) -> float:
        """Root mean square over all channels."""
        return math.sqrt(self.squares / max(1, self.count))

    @property
    def width(self) -> float:
        """Width of the range of all channels together, 0 included."""
        return float(self.high.max() - self.low.min())


def _plan_split(ranges: _ChannelRanges, allowed: int, target_width: float) -> _SplitPlan | None:
    """The split with the fewest copies whose range is at most `target_width` wide.

    Where `allowed` copies do not reach that width, the narrowest range that they reach; None where they narrow nothing.
    """
    best: tuple[tuple[float, float], float, float] | None = None
    # every channel beyond the range needs a copy, so only these can be beyond it
    highs = ranges.high.sort(descending=True).values[: allowed + 1]
    lows = ranges.low.sort().values[: allowed + 1]
    for high in dict.fromkeys(highs.tolist()):
        for low in dict.fromkeys(lows.tolist()):
            width = high - low
            if not 0 < width < ranges.width:
                continue
            copies = float(
                ((highs - high) / width).ceil().clamp(min=0).sum()
                + ((low - lows) / width).ceil().clamp(min=0).sum()
            )
            if copies > allowed:
                continue
            cost = (0.0, copies) if width <= target_width else (width, 0.0)
            if best is None or cost < best[0]:
                best = (cost, low, high)
    if best is None:
        return None
    _, low, high = best
    width = high - low
    channels, shifts, idle = [], [], []
    for excess, sign, value in ((ranges.high - high, 1.0, low), (low - ranges.low, -1.0, high)):
        for channel in (excess > 0).nonzero().flatten().tolist():
            for k in range(1, math.ceil(float(excess[channel]) / width) + 1):
                channels.append(channel)
                shifts.append(sign * k * width)
                idle.append(value)
    return _SplitPlan(low, high, tuple(channels), tuple(shifts), tuple(idle))


def _add_channels(
    editor: Editor, x: fx.Node, linears_of_x: list[tuple[fx.Node, Weight]], plan: _SplitPlan
) -> None:
    """Let the linears that read `x` read its clamped channels and the clamped copies, and widen their weights."""
    program, first = editor.program, linears_of_x[0][0]
    site = linears_of_x[0][1].site
    value = x.meta["val"]
    channels = torch.tensor(plan.channels, device=program.device)
    shifts = torch.tensor(plan.shifts, dtype=value.dtype, device=program.device)
    index = editor.parameter(editor.fresh(f"{site}_outliers"), channels, frozen=True, part=NodeRole.CHANNELS)
    shift = editor.parameter(editor.fresh(f"{site}_shifts"), shifts, frozen=True, part=NodeRole.SHIFT)
    copies = editor.call(aten.index_select.default, x, -1, index, like=first, site=site, part=NodeRole.COPIES)
    shifted = editor.call(aten.sub.Tensor, copies, shift, like=first, site=site, part=NodeRole.COPIES)
    clamped = [
        editor.call(aten.clamp.default, item, plan.low, plan.high, like=first, site=site, part=NodeRole.CLAMP)
        for item in (x, shifted)
    ]
    wide = editor.call(aten.cat.default, clamped, -1, like=first, site=site, part=NodeRole.COPIES)
    idle = torch.tensor(plan.idle, dtype=value.dtype, device=program.device)
    for linear, weight in linears_of_x:
        matrix = program.tensor(weight.site)
        axis = 1 - weight.channel_axis
        copied = matrix.index_select(axis, channels)
        constant = (copied @ idle) if axis == 1 else (idle @ copied)
        bias = linear.args[2] if len(linear.args) > 2 else None
        editor.assign(weight.site, torch.cat([matrix, copied], axis))
        reader = _subtract_from_bias(editor, weight, bias, constant)
        stored = editor.read(weight.site)
        operand = editor.call(aten.t.default, stored, like=linear) if weight.transposed else stored
        widened = editor.call(aten.linear.default, wide, operand, reader, like=linear)
        editor.replace(linear, widened)


def _subtract_from_bias(editor: Editor, weight: Weight, bias: object, constant: torch.Tensor) -> fx.Node:
    """The bias of a linear minus `constant` [out], what the idle copies add to its output."""
    old = evaluate(editor.program, bias) if isinstance(bias, fx.Node) else torch.zeros_like(constant)
    return _set_bias(editor, weight, bias, old - constant, f"{weight.site}_bias")


def _set_bias(editor: Editor, weight: Weight, bias: object, new: torch.Tensor, name: str) -> fx.Node:
    """The node of a linear's new bias: under the old name where nothing else reads that, else a parameter `name`.

    A new parameter is frozen where what it replaces (the bias, else the weight) is.
    """
    plain = isinstance(bias, fx.Node) and bias.op == "get_attr"
    if isinstance(bias, fx.Node) and plain and len(bias.users) == 1:
        return editor.assign(str(bias.target), new)
    replaced = str(bias.target) if isinstance(bias, fx.Node) and plain else weight.site
    frozen = replaced in editor.program.frozen
    return editor.parameter(editor.fresh(name), new, like=weight.node, frozen=frozen, part=NodeRole.BIAS)


def _copy_counts(peaks: torch.Tensor, limit: float, margin: float) -> torch.Tensor:
    """The number of copies that each neuron needs; the last copy may exceed the limit by the factor `margin`."""
    return (peaks / (margin * limit)).ceil().sub(1).clamp(min=0)


def _copies(peaks: torch.Tensor, limit: float, margin: float) -> list[tuple[int, int]]:
    """(neuron, k) for each copy, shifted by k * limit. Call it where `_copy_counts` are known to be few."""
    counts = _copy_counts(peaks, limit, margin)
    return [
        (neuron, shift)
        for neuron in counts.nonzero().flatten().tolist()
        for shift in range(1, int(counts[neuron]) + 1)
    ]


@dataclass(frozen=True)
class _FeedForward:
    """The nodes and weights of linear (up) -> activation -> linear (down)."""

    up: fx.Node
    activation: fx.Node
    down: fx.Node
    up_weight: Weight
    down_weight: Weight


def _feedforward(program: Program, activation: fx.Node) -> _FeedForward | None:
    """The feed-forward around an activation; None where a weight or a value in between has another reader."""
    if not traits_of(activation).relu_like:  # then min(f(h), c) + f(h - c) is close to f(h)
        return None
    up = activation.args[0]
    if not isinstance(up, fx.Node) or up.target is not aten.linear.default or len(up.users) != 1:
        return None
    last = activation
    while len(last.users) == 1 and traits_of(next(iter(last.users))).kind is Kind.DROPOUT:
        last = next(iter(last.users))
    if len(last.users) != 1:
        return None
    down = next(iter(last.users))
    if down.target is not aten.linear.default or down.args[0] is not last:
        return None
    first, second = weight_of(program, up), weight_of(program, down)
    if first is None or second is None or not (_has_one_reader(first) and _has_one_reader(second)):
        return None
    return _FeedForward(up, activation, down, first, second)


def _has_one_reader(weight: Weight) -> bool:
    """Whether a weight is a plain parameter, not an expression, and one linear alone reads it."""
    node = weight.node
    if node.op != "get_attr" or len(node.users) != 1:
        return False
    return not weight.transposed or len(next(iter(node.users)).users) == 1


def _add_neurons(
    editor: Editor, feedforward: _FeedForward, limit: float, copies: list[tuple[int, int]], padding: int
) -> None:
    """Clamp the neurons of a feed-forward at `limit` and append their copies, shifted by k * limit, and neurons of zeros."""
    program = editor.program
    up, activation, down = feedforward.up, feedforward.activation, feedforward.down
    up_weight, down_weight = feedforward.up_weight, feedforward.down_weight
    neurons = torch.tensor([neuron for neuron, _ in copies], device=program.device)
    shifts = torch.tensor([float(shift) for _, shift in copies]) * limit
    up_matrix, down_matrix = program.tensor(up_weight.site), program.tensor(down_weight.site)
    bias = up.args[2] if len(up.args) > 2 else None
    old = (
        evaluate(program, bias)
        if isinstance(bias, fx.Node)
        else up_matrix.new_zeros(up_matrix.shape[up_weight.channel_axis])
    )
    _append_copies(editor, up_weight, up_matrix, neurons, up_weight.channel_axis, padding)
    _append_copies(editor, down_weight, down_matrix, neurons, 1 - down_weight.channel_axis, padding)
    shifted = torch.cat([old, old[neurons] - shifts.to(old), old.new_zeros(padding)])
    reader = _set_bias(editor, up_weight, bias, shifted, up_weight.site.removesuffix("weight") + "bias")
    preactivation = editor.call(aten.linear.default, up.args[0], up.args[1], reader, like=up)
    call: Any = activation.target
    options: dict[str, Any] = dict(activation.kwargs)
    active = editor.call(call, preactivation, *activation.args[1:], like=activation, **options)
    clamped = editor.call(
        aten.clamp.default, active, None, limit, like=activation, site=up_weight.site, part=NodeRole.CLAMP
    )
    activation.replace_all_uses_with(clamped)
    widened = editor.call(aten.linear.default, clamped, *down.args[1:], like=down)
    down.replace_all_uses_with(widened)


def _append_copies(
    editor: Editor, weight: Weight, value: torch.Tensor, neurons: torch.Tensor, axis: int, padding: int
) -> None:
    """Append copies of the rows or columns of `neurons` to a weight, and `padding` ones of zeros."""
    zeros = torch.zeros_like(value.narrow(axis, 0, 1)).repeat_interleave(padding, axis)
    editor.assign(weight.site, torch.cat([value, value.index_select(axis, neurons), zeros], axis))
