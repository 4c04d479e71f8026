"""plan: what each of many ranks would hold and send in a training step, without ranks, weights or memory for them; or what `Fit` would
choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, overload

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from bmgraph.backends.backend_base import Backend
from bmgraph.backends.engine_trials import BackendTrials
from bmgraph.backends.torch.backend import Torch
from bmgraph.compiler import capture_to_compile, checked, tokenizer_given, with_prepended
from bmgraph.errors import InputError
from bmgraph.frontend.capture import Example
from bmgraph.ir.joined_graphs import join
from bmgraph.ir.program import Program
from bmgraph.ir.shape_inference import propagate
from bmgraph.pass_manager.pass_base import Pass
from bmgraph.pass_manager.report import Report
from bmgraph.pass_manager.run_settings import Verify
from bmgraph.passes.fit.fit import Fit
from bmgraph.passes.fit.plan import FitPlan
from bmgraph.pipeline import batches_of, manager_of
from bmgraph.runtime.engine_base import Engine
from bmgraph.runtime.training.trainer import Trainer
from bmgraph.training.joint_graph import trace_step
from bmgraph.training.liveness import fakes_of
from bmgraph.training.parameter_groups import groups_of
from bmgraph.training.step_plan import StepPlan, plan_step
from bmgraph.utils.progress import working
from bmgraph.utils.torch_internals import fake_group, planning_mode

if TYPE_CHECKING:
    from bmgraph.pass_manager.calibration_texts import Calibration


@overload
def plan(
    model: nn.Module | Program, passes: Sequence[Pass] = (), *, example: Example | None = None, backend: Torch[Trainer],
    world_size: int = 1, resources: Mapping[str, object] | None = None, calibration: Calibration | None = None,
    max_drift: float | None = None, verify: Verify = "numeric",
) -> StepPlan: ...  # fmt: skip


@overload
def plan(
    model: nn.Module | Program, passes: Sequence[Pass] = (), *, example: Example | None = None, backend: str | Backend[Engine],
    world_size: int = 1, resources: Mapping[str, object] | None = None, calibration: Calibration | None = None,
    max_drift: float | None = None, verify: Verify = "numeric",
) -> FitPlan: ...  # fmt: skip


@overload
def plan(
    model: nn.Module | Program, passes: Sequence[Pass] = (), *, example: Example | None = None,
    backend: str | Backend[Engine | Trainer], world_size: int = 1, resources: Mapping[str, object] | None = None,
    calibration: Calibration | None = None, max_drift: float | None = None, verify: Verify = "numeric",
) -> StepPlan | FitPlan: ...  # fmt: skip


def plan(
    model: nn.Module | Program,
    passes: Sequence[Pass] = (),
    *,
    example: Example | None = None,
    backend: str | Backend[Engine | Trainer],
    world_size: int = 1,
    resources: Mapping[str, object] | None = None,
    calibration: Calibration | None = None,
    max_drift: float | None = None,
    verify: Verify = "numeric",
) -> StepPlan | FitPlan:
    """What would be, before anything is built.

    For a backend that trains, the plan of a training step of one of `world_size` ranks: its memory and traffic; see `StepPlan`.
    The model may be on the `meta` device: weights are neither read nor made, and no other rank is needed. Arguments are as
    in `compile`; `passes` run unchecked, and those of the model stage on the model as it is. Ranks share the example as
    they would a batch, each at least one row.

    For a backend that builds engines, and a `Fit` among the passes: what it would choose, with the whole curve; see `FitPlan`. Then
    `calibration`, `max_drift` and `verify` are as in `compile`, and the passes in front of it run.

    Raises InputError within a process group, where there is nothing to plan, and what `compile` raises before it builds.

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.backends import AdamW, Torch
        >>> from bmgraph.passes import Fit, ZeRO
        >>> with torch.device("meta"):
        ...     model = torch.nn.Linear(1024, 1024)
        >>> def squared(outputs, inputs):
        ...     return outputs["output"].square().sum(), torch.ones_like(outputs["output"]).sum()
        >>> backend = Torch(optimizer=AdamW(), loss=squared)
        >>> bg.plan(model, [ZeRO(3)], example=(torch.randn(8, 1024),), backend=backend, world_size=8).parameters
        524800
        >>> over = ("quantize{scheme=int4|int8,activations=none}",)
        >>> model = torch.nn.Linear(256, 256)
        >>> bg.plan(model, [Fit(bytes="50KB", over=over)], example=(torch.randn(8, 256),), backend=Torch()).passes
        'quantize{scheme=int4,activations=none}'
    """
    if world_size < 1:
        raise InputError(f"world_size={world_size}: give a number of 1 or more")
    if dist.is_available() and dist.is_initialized():
        raise InputError(
            "bg.plan plans for ranks by itself: call it without a process group of torch.distributed"
        )
    place = next((place for place, item in enumerate(passes) if isinstance(item, Fit)), None)
    if place is not None:
        return _fit_plan(model, passes, example, backend, resources, calibration, max_drift, verify)
    config, model_passes = checked(model, passes, backend)
    if not isinstance(config, Torch) or config.optimizer is None:
        raise InputError(
            f"backend={backend!r}: give a backend that trains, such as Torch(optimizer=AdamW(lr=1e-3)), or a Fit among the passes: there is nothing else "
            "to plan"
        )
    manager = manager_of((), None, resources, None, "off", config.target, False)
    program = manager.run(model_passes, capture_to_compile(model, _on_meta(model, example), False, config))
    with fake_group(world_size), working("planning"):
        step = trace_step(
            _without_data(join(program)[0]), config.loss, config.batch, config.accumulate, config.numbers,
            gather=config.gather,
        )  # fmt: skip
        step.moments = config.optimizer.kept_moments
        step.updates_in_backward = config.optimizer_in_backward and config.accumulate == 1
        step = manager.run(config.passes, step)
        return plan_step(
            step, config.optimizer, config.clip_norm, None, config.batch, config.accumulate,
            groups_of(step, config.optimizer), config.optimizer_in_backward,
        )  # fmt: skip


def _fit_plan(
    model: nn.Module | Program,
    passes: Sequence[Pass],
    example: Example | None,
    backend: str | Backend[Engine | Trainer],
    resources: Mapping[str, object] | None,
    calibration: Calibration | None,
    max_drift: float | None,
    verify: Verify,
) -> FitPlan:
    """What the first `Fit` would choose."""
    config, model_passes = checked(model, passes, backend, resources or {})
    if config.chooses:
        raise InputError(
            f"backend {config.name!r} chooses among several, each with a plan of its own: name one of them"
        )
    trains = config.trains or any(item.will_train for item in model_passes)
    first = capture_to_compile(model, example, trains, config)
    model_passes = (*with_prepended(config, first, model_passes, Report()), *model_passes)
    place, asked = next((place, item) for place, item in enumerate(model_passes) if isinstance(item, Fit))
    batches = batches_of(calibration, first, tokenizer_given(resources, None))
    manager = replace(
        manager_of((), batches, resources, max_drift, verify, config.target, trains),
        engines=None if config.trains else BackendTrials(config),
    )
    return manager.consult(model_passes, place, first, asked.plan)


def _on_meta(model: nn.Module | Program, example: Example | None) -> Example | None:
    """The example, without values for a model on the `meta` device."""
    if isinstance(model, Program) or not any(item.is_meta for item in model.parameters()):
        return example
    moved: Example | None = pytree.tree_map_only(torch.Tensor, lambda value: value.to("meta"), example)
    return moved


def _without_data(program: Program) -> Program:
    """The program with parameters that have no data; from the `meta` device it comes to where it would train."""
    found = program.clone()
    device = program.device
    if device.type == "meta":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mode = planning_mode()
    found.parameters = {name: fake.to(device) for name, fake in fakes_of(program.parameters, mode).items()}
    for name, buffer in program.buffers.items():
        on_meta = buffer.device.type == "meta"
        found.buffers[name] = (
            torch.zeros(buffer.shape, dtype=buffer.dtype, device=device) if on_meta else buffer
        )
    propagate(found, everything=True)
    return found
