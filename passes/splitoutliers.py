"""SplitOutliers: a feed-forward neuron that grows too large is shared out over several that do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from bmgraph.context import Context
from bmgraph.editor import Editor
from bmgraph.errors import InputError
from bmgraph.modes import DROPOUTS
from bmgraph.pass_base import Effect, Pass
from bmgraph.program import Program
from bmgraph.weights import Weight, weight_of

aten = torch.ops.aten

LINEAR_FAR_OUT = (aten.gelu.default, aten.relu.default, aten.silu.default)
"""Activations with f(h) = h for large h and f(h) = 0 for very negative h: min(f(h), c) + f(h - c) is nearly f(h)."""

MARGIN = 1.05
"""How far a neuron may pass the limit before it gets a copy."""


@dataclass(frozen=True, repr=False)
class SplitOutliers(Pass):
    """Clamp each plain feed-forward's activation at a limit c and give neurons that pass it copies shifted by c, 2c, ...

    For an activation f that is the identity far out, f(h) = min(f(h), c) + min(f(h - c), c) + ...: exact for ReLU,
    within 0.17 for GELU near h = c and 0.28 for SiLU. What remains fits a narrow range, so that 8 bits are spent where
    most values are. Neurons whose calibrated maximum exceeds 1.05 c get copies; c is the least limit, no smaller
    than `least`, for which at most `share` of the neurons are copied.
    """

    effect: ClassVar[Effect] = "approximate"
    default_drift: ClassVar[float] = 0.05
    may_match_nothing: ClassVar[bool] = True

    share: float = 0.01
    least: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share < 1:
            raise InputError(f"share={self.share}: give a share of the neurons between 0 and 1")
        if self.least <= 0:
            raise InputError(f"least={self.least}: give a limit above 0")

    @property
    def resources(self) -> tuple[str, ...]:
        """The batches on which neurons are measured."""
        return ("calibration",)

    def run(self, program: Program, context: Context) -> Program:
        """Split the feed-forwards of a program."""
        found = [site for node in program.graph.nodes if (site := _feedforward(program, node)) is not None]
        largest: dict[str, torch.Tensor] = {}

        def visit(name: str, value: torch.Tensor) -> None:
            peak = value.reshape(-1, value.shape[-1]).amax(0)
            largest[name] = torch.maximum(largest[name], peak) if name in largest else peak

        context.calibrate(program, {site.activation.name for site in found}, visit)
        for site in found:
            limit, copies = self._plan(largest[site.activation.name])
            if limit is None:
                context.declined(site.up_weight.site, "no neuron stands out")
                continue
            with program.edit(by=str(self)) as editor:
                _split(editor, site, limit, copies)
            context.edited(site.up_weight.site, f"{len(copies)} shifted copies of neurons, clamped at {limit:.3g}")
        return program

    def _plan(self, largest: torch.Tensor) -> tuple[float | None, list[tuple[int, int]]]:
        """The limit, and (neuron, k) for every copy shifted by k limits."""
        peaks = largest.double()
        allowed = max(1, int(self.share * len(peaks)))
        limit = self.least
        while len(copies := _copies(peaks, limit)) > allowed:
            limit *= 1.1
        return (limit, copies) if copies else (None, [])


def _copies(peaks: torch.Tensor, limit: float) -> list[tuple[int, int]]:
    return [
        (int(neuron), shift)
        for neuron in (peaks > MARGIN * limit).nonzero().flatten()
        for shift in range(1, 1 + int(float(peaks[neuron]) / (MARGIN * limit)))
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
    weights = weight_of(program, up), weight_of(program, down)
    if any(weight is None or weight.node.op != "get_attr" or len(weight.node.users) != 1 for weight in weights):
        return None
    assert weights[0] is not None
    assert weights[1] is not None
    return _FeedForward(up, activation, down, *weights)


def _split(editor: Editor, site: _FeedForward, limit: float, copies: list[tuple[int, int]]) -> None:
    program = editor.program
    neurons = torch.tensor([neuron for neuron, _ in copies])
    shifts = torch.tensor([float(shift) for _, shift in copies]) * limit
    up, down = program.tensor(site.up_weight.site), program.tensor(site.down_weight.site)
    bias = site.up.args[2] if len(site.up.args) > 2 else None
    old = program.tensor(str(bias.target)) if isinstance(bias, fx.Node) else up.new_zeros(up.shape[site.up_weight.channel_axis])
    neurons = neurons.to(up.device)
    _grow(editor, site.up_weight, up, neurons, site.up_weight.channel_axis)
    _grow(editor, site.down_weight, down, neurons, 1 - site.down_weight.channel_axis)
    shifted = torch.cat([old, old[neurons] - shifts.to(old)])
    name = str(bias.target) if isinstance(bias, fx.Node) else site.up_weight.site.removesuffix("weight") + "bias"
    reader = editor.assign(name, shifted) if isinstance(bias, fx.Node) else editor.parameter(name, shifted, part="bias")
    sums = editor.call(aten.linear.default, site.up.args[0], site.up.args[1], reader, like=site.up)
    active = editor.call(site.activation.target, sums, *site.activation.args[1:], like=site.activation, **site.activation.kwargs)
    clamped = editor.call(aten.clamp.default, active, None, limit, like=site.activation, site=site.up_weight.site, part="clamp")
    site.activation.replace_all_uses_with(clamped)
    fresh = editor.call(aten.linear.default, clamped, *site.down.args[1:], like=site.down)
    site.down.replace_all_uses_with(fresh)


def _grow(editor: Editor, weight: Weight, value: torch.Tensor, neurons: torch.Tensor, axis: int) -> None:
    """Repeat the rows or columns of some neurons at the end of a weight."""
    editor.assign(weight.site, torch.cat([value, value.index_select(axis, neurons)], axis))
