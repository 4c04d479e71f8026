"""What a step computes in, how its gradients leave it, and the scale of a loss in float16.

A step in half precision keeps, beside what it computes with, a float32 master of each trained tensor (`StepProgram.masters`), and its
optimizer state is float32. Gradients are computed in half precision, like the products that make them, and cast as soon as
they are whole; in this dtype they are summed over ranks.

In float16 small gradients vanish, so the backward pass starts with a factor, the loss scale, over the number of items of the
micro-batch on this rank (so of the size that a mean loss has); returned gradients are divided by it, in float32, in front
of all sums. An overflow leaves infinity or NaN in them (Micikevicius et al. 2018, arXiv:1710.03740).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from bmgraph.ir.program import output_node
from bmgraph.training.placement import Place, Update
from bmgraph.training.step_program import CONSTANT, StepProgram

aten = torch.ops.aten

SCALE = f"{CONSTANT}scale"
"""The name of the loss scale, f32[], among a step's tensors: the trainer sets it before each step in float16."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

STOP, SKIP = "stop", "skip"
POLICIES = (STOP, SKIP)
MAX_SKIPS = 20
"""So many steps are skipped one after the other at most, unless more are allowed."""
"""What to do with a step whose numbers are not finite."""


@dataclass(frozen=True)
class Precision:
    """The dtype that a step computes in, and the dtype in which its gradients are summed over ranks."""

    compute: torch.dtype = torch.float32
    reduce: torch.dtype = torch.float32

    @property
    def is_half(self) -> bool:
        """Whether there are masters beside the values that the step computes with."""
        return self.compute != torch.float32

    @property
    def is_scaled(self) -> bool:
        """Whether the loss is scaled."""
        return self.compute == torch.float16


FP32 = Precision()


def dtypes_of(step: StepProgram) -> dict[str, str]:
    """The options `precision` and `reduce_dtype` that a step was traced with."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    narrow = any(update.gradient.dtype == torch.bfloat16 for update in step.updates.values())
    half = step.compute != torch.float32 and narrow
    return {"precision": names[step.compute], "reduce_dtype": "bf16" if half else "fp32"}


def scaled_loss(total: torch.Tensor, count: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What backward begins with: the summed loss over its number of items, times the loss scale."""
    return total * (scale / count.clamp(min=1)).detach()


def cast_gradients(step: StepProgram, precision: Precision) -> None:
    """Return each gradient in the dtype that it is summed in, without its scale, as soon as it is whole; the optimizer state
    of what is stored in half precision is float32."""
    unscale = _unscale(step) if precision.is_scaled else None
    done: dict[fx.Node, fx.Node] = {}
    for gradient in step.gradients().values():
        if gradient not in done:
            done[gradient] = _cast(step, gradient, precision, unscale)
    returned = step.returned()
    trained = len(step.trained)
    gradients = (done[node] for node in returned[2 : 2 + trained])
    output_node(step.graph).args = ((*returned[:2], *gradients, *returned[2 + trained :]),)
    step.updates = {
        name: Update(_in(update.gradient, precision.reduce), _in(update.state, torch.float32))
        for name, update in step.updates.items()
    }


def _cast(step: StepProgram, gradient: fx.Node, precision: Precision, unscale: fx.Node | None) -> fx.Node:
    found, following = gradient, gradient.next
    source = gradient.args[0] if gradient.target is aten._to_copy.default else None
    if isinstance(source, fx.Node) and source.meta["val"].dtype == torch.float32:
        found = source  # a gradient of a norm: rounding it would gain nothing

    def to(dtype: torch.dtype) -> fx.Node:
        if found.meta["val"].dtype == dtype:
            return found
        return step.call(aten._to_copy.default, found, dtype=dtype, before=following, like=gradient)

    if unscale is not None:
        found = step.call(aten.mul.Tensor, to(torch.float32), unscale, before=following, like=gradient)
    return to(precision.reduce)


def _unscale(step: StepProgram) -> fx.Node:
    """The number of items over the loss scale, f32[], as soon as the number is known."""
    count, scale = step.returned()[1], step.reads()[SCALE]
    following = count.next
    while following.op == "placeholder":
        following = following.next
    least = step.call(aten.clamp.default, count, 1, before=following)
    return step.call(aten.div.Tensor, least, scale, before=following)


def _in(place: Place, dtype: torch.dtype) -> Place:
    return replace(place, dtype=dtype)
