"""Simulates the update phase of a step without data: it runs on fake tensors, and every storage is followed."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bmgraph.distributed.process_group import SilentRanks
from bmgraph.training.collectives import COLLECTIVES, Buffers
from bmgraph.training.liveness import Held, Point, Sent, Storages, storages_of
from bmgraph.training.optimizers import Optimizer
from bmgraph.training.parameter_groups import Groups
from bmgraph.training.step_program import StepProgram
from bmgraph.training.update_phase import UpdatePhase
from bmgraph.utils.torch_internals import FakeTensorMode, TorchDispatchMode

aten = torch.ops.aten
collective = torch.ops._c10d_functional


@dataclass
class SimulatedUpdate:
    """An update after the first: a point for each call, its collectives, and the bytes of the optimizer's state between
    steps; `away` are those of states that are offloaded."""

    points: list[Point] = field(default_factory=list)
    collectives: list[Sent] = field(default_factory=list)
    state: int = 0
    away: int = 0


def simulate_update(
    step: StepProgram,
    optimizer: Optimizer,
    clip_norm: float | None,
    groups: Groups,
    tensors: Mapping[str, torch.Tensor],
    masters: Mapping[str, torch.Tensor],
    gradients: Mapping[str, torch.Tensor],
    buffers: Buffers,
    mode: FakeTensorMode,
    in_backward: bool = False,
) -> SimulatedUpdate:
    """Run two updates on fake tensors and gradients, and return what the second one holds; `in_backward`: one tensor after
    another."""
    ranks = SilentRanks(step.ranks.rank, step.ranks.size)
    planned = replace(step, tensors=dict(tensors), masters=dict(masters), ranks=ranks)
    followed = _Followed(step.device)
    followed.storages.leave_out(buffers)
    for tensor in tensors.values():
        followed.see(tensor, Held.PARAMETERS)
    for master in planned.masters.values():
        followed.see(master, Held.STATE)
    with mode, followed, torch.no_grad():
        phase = UpdatePhase(planned, groups)
        phase.begin(optimizer)
        kinds = {
            name: Held.OFFLOADED if update.state.folder else Held.STATE
            for name, update in step.updates.items()
        }
        for name in step.updates:
            held = phase.saved(name)[1]
            if held is not planned.tensors[name]:
                followed.become(held, kinds[name])
            followed.become(list(phase.moments[name].values()), kinds[name])
        for _ in range(2):
            followed.found = SimulatedUpdate()
            if in_backward:
                _update_one_by_one(phase, optimizer, gradients, followed)
            else:
                _update(phase, optimizer, clip_norm, gradients, followed)
            for name, moments in phase.moments.items():
                followed.become(list(moments.values()), kinds[name])
    followed.found.state = followed.storages.bytes[Held.STATE]
    followed.found.away = followed.storages.bytes[Held.OFFLOADED] + sum(
        tensor.nbytes
        for name, moments in phase.moments.items()
        for tensor in (phase.saved(name)[1], *moments.values())
        if tensor.device.type != step.device.type
    )
    return followed.found


def _update(
    phase: UpdatePhase,
    optimizer: Optimizer,
    clip_norm: float | None,
    gradients: Mapping[str, torch.Tensor],
    followed: _Followed,
) -> None:
    """What a trainer does between the gradient phase and the next step."""
    followed.where = "means of gradients"
    sums: dict[str, torch.Tensor] = {}
    for name, gradient in gradients.items():
        sums[name] = gradient.view(gradient.shape)  # new ones, unless it lies in a pooled buffer
        if not followed.storages.leaves_out(gradient):
            sums[name] = torch.empty_like(gradient)
            followed.become(sums[name], Held.GRADIENTS)
    means = phase.means(sums, 2.0)
    followed.become(list(means.values()), Held.GRADIENTS)
    if clip_norm is not None:
        followed.where = "norm of gradients"
        phase.clip(means, clip_norm)
    followed.where = "update"
    phase.run(optimizer, means, 1.0)


def _update_one_by_one(
    phase: UpdatePhase, optimizer: Optimizer, gradients: Mapping[str, torch.Tensor], followed: _Followed
) -> None:
    """What is done with each gradient as soon as it is whole."""
    followed.where = "update in backward"
    for name, gradient in gradients.items():
        mean = {name: phase.mean(name, torch.empty_like(gradient), 2.0)}
        followed.become(mean[name], Held.GRADIENTS)
        phase.move(optimizer, mean, 1.0)
    phase.run(optimizer, {}, 1.0)


class _Followed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages of all tensors that calls make on one device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages = Storages()
        self.found = SimulatedUpdate()
        self.where = ""
        self._device = device.type
        self._gone: list[tuple[int, ...]] = []

    def see(self, value: Any, held: Held) -> None:
        """Hold the storages of tensors as long as these live."""
        for tensor in _tensors_on(self._device, value):
            keys = tuple(storages_of(tensor))
            self.storages.hold(tensor, held)
            weakref.finalize(tensor, self._gone.append, keys).atexit = False

    def become(self, value: Any, held: Held) -> None:
        """Count the storages of tensors as held for something else."""
        for tensor in _tensors_on(self._device, value):
            self.storages.become(tensor, held)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        while self._gone:
            self.storages.release(self._gone.pop())
        if func is aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        if func is collective.wait_tensor.default:
            return args[0]
        made = func(*args, **dict(kwargs or {}))
        self.see(made, Held.TEMPORARIES)
        if func.namespace == COLLECTIVES:
            sizes = (sum(storages_of(item).values()) for item in (args[0], made))
            self.found.collectives.append(Sent(str(func).split(".")[1], max(sizes)))
        self.found.points.append(self.storages.point(self.where))
        return made


def _tensors_on(device: str, value: Any) -> list[torch.Tensor]:
    items = value if isinstance(value, (tuple, list)) else [value]
    return [item for item in items if isinstance(item, torch.Tensor) and item.device.type == device]
