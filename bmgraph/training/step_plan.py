"""The plan of a step: what a rank will hold and send, known before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from bmgraph.errors import InputError
from bmgraph.training.accumulation import micro_steps
from bmgraph.training.collectives import Buffers
from bmgraph.training.executor import Tensors
from bmgraph.training.liveness import Held, Point, Sent, Shapes, Simulated, fakes_of, simulate
from bmgraph.training.optimizers import Optimizer
from bmgraph.training.parameter_groups import NO_GROUPS, Groups
from bmgraph.training.step_program import WHOLE, StepProgram
from bmgraph.training.update_memory import simulate_update
from bmgraph.utils.torch_internals import FakeTensorMode, planning_mode

_RINGS = {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1, "all_reduce": 2, "broadcast": 1}
"""How often a collective moves its whole tensor past each rank, on a ring (Thakur et al. 2005)."""


@dataclass(frozen=True)
class Traffic:
    """The collectives of one kind in a step: how many, and how many bytes each rank sends for them (on a ring)."""

    kind: str
    calls: int
    bytes: int


@dataclass(frozen=True)
class StepPlan:
    """What one rank holds and sends in a training step after the first; all sizes are bytes. Prints as a table.

    Held are the storages of tensors; what kernels and libraries allocate inside is not in it. `peak` is the point with the
    most bytes, `timeline` all points in order, `offloaded` what lies outside of the device (in host memory or files).

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.backends import AdamW, Torch
        >>> model, x = torch.nn.Linear(4, 2), torch.randn(6, 4)
        >>> backend = Torch(optimizer=AdamW(), loss=lambda outputs, inputs: outputs["output"].square().mean())
        >>> bg.compile(model, example=(x,), backend=backend).plan.parameters
        40
    """

    ranks: int
    inputs: Mapping[str, tuple[int, ...]]
    """The sizes of the inputs that a rank works on."""
    timeline: tuple[Point, ...]
    traffic: tuple[Traffic, ...]
    offloaded: int

    @property
    def peak(self) -> Point:
        """The first point at which most bytes are held."""
        return max(self.timeline, key=lambda point: point.total)

    @property
    def sent(self) -> int:
        """Bytes that a rank sends in a step."""
        return sum(item.bytes for item in self.traffic)

    def most(self, held: Held) -> int:
        """The most bytes that are held for one purpose at any point of the step."""
        return max(point.bytes.get(held, 0) for point in self.timeline)

    @property
    def parameters(self) -> int:
        """Bytes of this rank's parameters, or shares of them, and of buffers."""
        return self.most(Held.PARAMETERS)

    @property
    def gradients(self) -> int:
        """The most bytes of gradients."""
        return self.most(Held.GRADIENTS)

    @property
    def state(self) -> int:
        """Bytes of the optimizer's state on the device: moments and master copies."""
        return self.most(Held.STATE)

    @property
    def gathered(self) -> int:
        """The most bytes of whole weights that are made of shares or codes."""
        return self.most(Held.GATHERED)

    @property
    def activations(self) -> int:
        """The most bytes of activations, their gradients and the batch."""
        return self.most(Held.ACTIVATIONS)

    def __str__(self) -> str:
        return _table(self)


def plan_step(
    step: StepProgram,
    optimizer: Optimizer,
    clip_norm: float | None = None,
    inputs: Shapes | None = None,
    batch: str = WHOLE,
    accumulate: int = 1,
    groups: Groups = NO_GROUPS,
    in_backward: bool = False,
) -> StepPlan:
    """The plan of a step on `inputs` (sizes by name that each rank works on), or on this rank's rows of the example.

    The other settings are those of the trainer; `in_backward`: `optimizer_in_backward`. Nothing is computed or sent. Raises
    InputError if there is no example.
    """
    shapes = rows_of_example(step, batch) if inputs is None else inputs
    mode = planning_mode()
    tensors, masters = fakes_of(step.tensors, mode), fakes_of(step.masters, mode)
    buffers = Buffers()
    runs = _gradient_runs(step, shapes, tensors, mode, accumulate, buffers, in_backward)
    gradients = _gradients_in(step, mode) if in_backward else dict(zip(step.trained, runs[-1].returned[2:]))
    update = simulate_update(
        step, optimizer, clip_norm, groups, tensors, masters, gradients, buffers, mode, in_backward
    )
    given: Shapes = shapes
    if (
        inputs is None and step.device.type == "cpu"
    ):  # each rank is given the whole batch, of which it takes views
        given = {name: tuple(value.shape) for name, value in step.outline.example.items()}
    batch_bytes = sum(prod(given[spec.name]) * spec.dtype.itemsize for spec in step.outline.inputs)
    points = [
        _with(_with(point, Held.STATE, update.state), Held.ACTIVATIONS, batch_bytes - run.batch)
        for run in runs
        for point in run.points
    ]
    points += [_with(point, Held.ACTIVATIONS, batch_bytes) for point in update.points]
    points = [_with(point, Held.GATHERED, buffers.gathered.nbytes) for point in points]
    points = [_with(point, Held.GRADIENTS, buffers.flat.nbytes + buffers.summed.nbytes) for point in points]
    sent = [item for run in runs for item in run.collectives]
    return StepPlan(
        step.ranks.size,
        {name: tuple(shape) for name, shape in shapes.items()},
        tuple(points),
        _traffic([*sent, *update.collectives], step.ranks.size),
        update.away,
    )


def _gradient_runs(
    step: StepProgram,
    shapes: Shapes,
    tensors: Tensors,
    mode: FakeTensorMode,
    accumulate: int,
    buffers: Buffers,
    in_backward: bool,
) -> list[Simulated]:
    """The runs of the gradient phase, in order: one for each micro-batch."""
    axes = step.rows.axes
    rows = min((shapes[name][axis] for name, axis in axes.items()), default=1)
    count = max(1, min(accumulate, rows))
    if count == 1:
        return [simulate(step, shapes, tensors, mode, None, buffers, in_backward)]
    part = {
        name: [-(-size // count) if axis == axes.get(name) else size for axis, size in enumerate(shape)]
        for name, shape in shapes.items()
    }
    micro = micro_steps(step)
    runs = [simulate(micro.first, part, tensors, mode, None, buffers)]
    for later in (*[micro.middle] * (count - 2), micro.last):
        sums = dict(zip(micro.names, runs[-1].returned))
        runs.append(simulate(later, part, tensors, mode, sums, buffers, in_backward and later is micro.last))
    return runs


def _gradients_in(step: StepProgram, mode: FakeTensorMode) -> dict[str, torch.Tensor]:
    """A gradient of each trained tensor, which the update takes while backward goes on."""
    with mode:
        return {
            name: torch.empty(
                update.gradient.shape, dtype=update.gradient.dtype, device=update.gradient.device
            )
            for name, update in step.updates.items()
        }


def rows_of_example(step: StepProgram, batch: str = WHOLE) -> dict[str, tuple[int, ...]]:
    """The sizes of the inputs of a rank: its rows of the example where the ranks share a batch, at least one."""
    example = step.outline.example
    if not example:
        raise InputError(
            "the program has no example to plan with: capture it with one, or give the sizes of inputs"
        )
    shapes = {name: tuple(value.shape) for name, value in example.items()}
    if not step.shared or batch != WHOLE:
        return shapes
    axes = step.rows.axes
    return {
        name: tuple(
            max(1, -(-size // step.ranks.size)) if axis == axes.get(name) else size
            for axis, size in enumerate(shape)
        )
        for name, shape in shapes.items()
    }


def _with(point: Point, held: Held, size: int) -> Point:
    return replace(point, bytes={**point.bytes, held: point.bytes.get(held, 0) + size})


def _traffic(collectives: Sequence[Sent], ranks: int) -> tuple[Traffic, ...]:
    found: dict[str, list[int]] = {}
    for item in collectives:
        found.setdefault(item.kind, []).append(item.bytes)
    return tuple(
        Traffic(kind, len(sizes), _RINGS.get(kind, 1) * sum(sizes) * (ranks - 1) // ranks)
        for kind, sizes in sorted(found.items())
    )


def size_text(size: float) -> str:
    """A number of bytes in a readable unit (powers of 1024)."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


_ROWS = {
    Held.PARAMETERS: "parameters and buffers",
    Held.GRADIENTS: "gradients",
    Held.STATE: "optimizer state and master weights",
    Held.GATHERED: "whole weights made of shares or codes",
    Held.ACTIVATIONS: "activations, their gradients, the batch",
    Held.TEMPORARIES: "temporaries of the update",
}


def _table(plan: StepPlan) -> str:
    sizes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in plan.inputs.items())
    lines = [f"one rank of {plan.ranks}, one step on {sizes}", ""]
    lines.append(f"{'memory':<42}{'at the peak':>14}{'at most':>14}")
    for held, text in _ROWS.items():
        lines.append(
            f"  {text:<40}{size_text(plan.peak.bytes.get(held, 0)):>14}{size_text(plan.most(held)):>14}"
        )
    lines.append(f"  {'all together':<40}{size_text(plan.peak.total):>14}")
    lines.append(f"  the peak is at: {plan.peak.where}")
    if plan.offloaded:
        lines.append(f"  {'offloaded state (host memory or files)':<40}{size_text(plan.offloaded):>14}")
    lines += ["", f"{'sent by a rank in a step':<42}{'calls':>14}{'bytes':>14}"]
    for item in plan.traffic:
        lines.append(f"  {item.kind.replace('_', ' '):<40}{item.calls:>14}{size_text(item.bytes):>14}")
    lines.append(f"  {'all together':<54}{size_text(plan.sent):>14}" if plan.traffic else "  nothing")
    return "\n".join(lines) + "\n"
