"""plan: what each of many ranks would hold and send in a training step, without ranks, weights or memory for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from bmgraph.backends.torch.backend import Torch
from bmgraph.compiler import capture_to_compile, checked
from bmgraph.errors import InputError
from bmgraph.frontend.capture import Example
from bmgraph.ir.joined_graphs import join
from bmgraph.ir.program import Program
from bmgraph.ir.shape_inference import propagate
from bmgraph.pass_manager.pass_base import Pass
from bmgraph.pipeline import manager_of
from bmgraph.runtime.training.trainer import Trainer
from bmgraph.training.joint_graph import trace_step
from bmgraph.training.liveness import fakes_of
from bmgraph.training.parameter_groups import groups_of
from bmgraph.training.step_plan import StepPlan, plan_step
from bmgraph.utils.progress import working
from bmgraph.utils.torch_internals import fake_group, planning_mode


def plan(
    model: nn.Module | Program,
    passes: Sequence[Pass] = (),
    *,
    example: Example | None = None,
    backend: Torch[Trainer],
    world_size: int = 1,
    resources: Mapping[str, object] | None = None,
) -> StepPlan:
    """The plan of a training step of one of `world_size` ranks: its memory and traffic; see `StepPlan`.

    The model may be on the `meta` device: weights are neither read nor made, and no other rank is needed. Arguments are as
    in `compile`; `passes` run unchecked, and those of the model stage on the model as it is. Ranks share the example as
    they would a batch, each at least one row.

    Raises InputError within a process group, and what `compile` raises before a trainer is built.

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.backends import AdamW, Torch
        >>> from bmgraph.passes import ZeRO
        >>> with torch.device("meta"):
        ...     model = torch.nn.Linear(1024, 1024)
        >>> def squared(outputs, inputs):
        ...     return outputs["output"].square().sum(), torch.ones_like(outputs["output"]).sum()
        >>> backend = Torch(optimizer=AdamW(), loss=squared)
        >>> bg.plan(model, [ZeRO(3)], example=(torch.randn(8, 1024),), backend=backend, world_size=8).parameters
        524800
    """
    if world_size < 1:
        raise InputError(f"world_size={world_size}: give a number of 1 or more")
    if dist.is_available() and dist.is_initialized():
        raise InputError(
            "bg.plan plans for ranks by itself: call it without a process group of torch.distributed"
        )
    config, model_passes = checked(model, passes, backend)
    if not isinstance(config, Torch) or config.optimizer is None:
        raise InputError(
            f"backend={backend!r}: give a backend that trains, such as Torch(optimizer=AdamW(lr=1e-3))"
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
