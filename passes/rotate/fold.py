"""Folds scales and rotations into parameters, in float64, and puts products where none can be folded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import fx

from bmgraph.analysis.coupling.coupled_dims import Spread
from bmgraph.analysis.interpreter import evaluate
from bmgraph.errors import PassError
from bmgraph.ir.editor import Editor
from bmgraph.ir.evaluation import upstream
from bmgraph.ir.node_role import NodeRole
from bmgraph.ir.program import Program
from bmgraph.ops.traits import argument, place_of
from bmgraph.pass_manager.context import Context
from bmgraph.passes.rotate.stream_plan import (
    TO_STREAM,
    WHOLE_OUTPUT,
    Bridge,
    Pending,
    Read,
    StreamPlan,
)
from bmgraph.utils.stored_tensor import in_memory

aten = torch.ops.aten

ROWS = 1 << 22
"""How many elements of a tensor are in float64 at a time, where its rows are independent."""


@dataclass(frozen=True)
class Scale:
    """Multiply along a dimension by factors f64[n]."""

    dim: int
    factors: torch.Tensor

    def apply(self, value: torch.Tensor) -> torch.Tensor:
        """f64 -> f64 of the same shape."""
        return (value.movedim(self.dim, -1) * self.factors.to(value.device)).movedim(-1, self.dim)


@dataclass(frozen=True)
class Turn:
    """Multiply along a dimension by an orthogonal matrix f64[n, n]: the whole dimension, or each of the rows of `places`
    i64[blocks, n], which hold its indices."""

    dim: int
    matrix: torch.Tensor
    places: torch.Tensor | None = None

    def apply(self, value: torch.Tensor) -> torch.Tensor:
        """f64 -> f64 of the same shape."""
        matrix, moved = self.matrix.to(value.device), value.movedim(self.dim, -1)
        if self.places is None:
            return (moved @ matrix).movedim(-1, self.dim)
        places, turned = self.places.to(value.device), moved.clone()
        turned[..., places] = moved[..., places] @ matrix
        return turned.movedim(-1, self.dim)


Step = Scale | Turn


@dataclass
class Folding:
    """What becomes of the parameters of a program: `shifts` are added to biases first, then `steps` are taken in order.

    `whole`: the number that a norm's weight or bias becomes. `biases`: for a weight that took the weight of a norm with a bias, the bias
    of its linear, which took that one, and along which dimension.
    """

    steps: dict[str, list[Step]] = field(default_factory=dict)
    shifts: dict[str, torch.Tensor] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=dict)
    biases: dict[str, tuple[str, int, torch.Tensor]] = field(default_factory=dict)

    def add(self, name: str, step: Step) -> None:
        """Take one more step with a parameter."""
        self.steps.setdefault(name, []).append(step)

    def assign(self, editor: Editor, context: Context) -> None:
        """Give all parameters their new values; says how gradients follow from the former ones."""
        program = editor.program
        for name in dict.fromkeys([*self.shifts, *self.steps]):
            steps, shift = self.steps.get(name, []), self.shifts.get(name)
            old = in_memory(program.tensor(name))
            editor.assign(name, stepped(old, steps, shift))
            context.reparametrized(name, partial(self._gradient, name))
        for name, number in self.whole.items():
            old = in_memory(program.tensor(name))
            editor.assign(name, torch.full_like(old, number))
            context.reparametrized(name, _unknown)

    def _gradient(self, name: str, before: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """The gradient of a parameter, by those of all before; None where they do not tell."""
        found = before[name].double()
        scales = [step for step in self.steps.get(name, []) if isinstance(step, Scale)]
        if any(float(step.factors.abs().min()) < 1e-2 * float(step.factors.abs().max()) for step in scales):
            return None  # what it is divided by is almost nothing
        if name in self.biases:
            bias, dim, shift = self.biases[name]
            if bias not in before:
                return None
            outer = before[bias].double().unsqueeze(-1) * shift.to(found.device)
            found = found - outer.movedim(-1, dim)
        for step in self.steps.get(name, []):
            found = (Scale(step.dim, 1 / step.factors) if isinstance(step, Scale) else step).apply(found)
        return found.to(before[name].dtype)


def _unknown(before: Mapping[str, torch.Tensor]) -> None:
    return None


def stepped(old: torch.Tensor, steps: Sequence[Step], shift: torch.Tensor | None = None) -> torch.Tensor:
    """(old + shift) after the steps, computed in float64, in the dtype of `old`."""
    if shift is not None or old.dim() < 2 or any(step.dim == 0 for step in steps):
        value = old.double()
        value = value if shift is None else value + shift.to(old.device)
        for step in steps:
            value = step.apply(value)
        return value.to(old.dtype).contiguous()
    found, rows = torch.empty_like(old), max(1, ROWS // max(1, old[0].numel()))
    for begin in range(0, len(old), rows):
        value = old[begin : begin + rows].double()
        for step in steps:
            value = step.apply(value)
        found[begin : begin + rows] = value
    return found


def fold_stream(editor: Editor, plan: StreamPlan, matrix: torch.Tensor, folding: Folding) -> int:
    """Note what becomes of the parameters of a stream that is multiplied by a matrix f64[width, width], and put products where they
    are needed; returns how many."""
    program = editor.program
    values = {pending: _values(program, pending, plan.width) for pending in plan.affine}
    for read, pending in plan.reads:
        _take(editor, read, *values[pending], folding)
    for scale in plan.scales:
        factors = in_memory(program.tensor(scale.name)).double().cpu()
        folding.add(str(scale.tensor.target), Scale(scale.dim, factors))
        if scale.bias is not None:
            folding.add(str(scale.bias.target), Scale(0, factors))
        folding.whole[scale.name] = 1.0
    for name, dims in plan.tensors.items():
        for dim in dims:
            folding.add(name, Turn(dim, matrix))
    made: dict[tuple[fx.Node, str, Pending], fx.Node] = {}
    for bridge in plan.bridges:
        key = (bridge.value, bridge.kind, bridge.pending)
        if key not in made:
            weight, shift = values.get(bridge.pending, (torch.ones(plan.width, dtype=torch.double), None))
            made[key] = _product(editor, plan, bridge, _between(bridge.kind, matrix, weight, shift))
        bridge.user.replace_input_with(bridge.value, made[key])
    for pending in plan.affine:
        _empty(program, pending, folding)
    return len(made)


def give_own(editor: Editor, read: Read, spread: Spread) -> str:
    """Let a call read a copy of its tensor, which belongs to the stream as the tensor does; returns its name."""
    program, name = editor.program, str(read.tensor.target)
    alias = next((other for other, kept in program.ties.items() if kept == name), None)
    if alias is not None:
        program.ties = {other: kept for other, kept in program.ties.items() if other != alias}
    own = editor.parameter(
        alias or editor.fresh(f"{name}_untied"),
        in_memory(program.tensor(name)).clone(),
        like=read.tensor,
        frozen=name in program.frozen,
    )
    weight = read.call.args[1]
    assert isinstance(weight, fx.Node)
    if weight is not read.tensor:
        weight = editor.call(aten.t.default, own, like=read.call)
        for dim in (0, 1):
            if (read.tensor, 1 - dim) in spread.labels:
                spread.labels[weight, dim] = spread.labels[read.tensor, 1 - dim]
    else:
        weight = own
    read.call.update_arg(1, weight)
    for dim in range(read.tensor.meta["val"].dim()):
        if (read.tensor, dim) in spread.labels:
            spread.labels[own, dim] = spread.labels[read.tensor, dim]
    return str(own.target)


def _values(program: Program, pending: Pending, width: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight and bias of a norm, f64[width]."""
    weight, bias = (
        None if item is None else in_memory(evaluate(program, item)).double().cpu() for item in pending
    )
    return torch.ones(width, dtype=torch.double) if weight is None else weight, bias


def _take(
    editor: Editor, read: Read, weight: torch.Tensor, bias: torch.Tensor | None, folding: Folding
) -> None:
    """Let the weight of a call take the weight of a norm, and its bias the product with the norm's bias."""
    name = str(read.tensor.target)
    if not any(isinstance(step, Scale) and step.dim == read.dim for step in folding.steps.get(name, ())):
        folding.add(name, Scale(read.dim, weight))  # once, however often it is read
    if bias is None:
        return
    value = in_memory(editor.program.tensor(name))
    shift = (value.movedim(read.dim, -1).double() @ bias.to(value.device)).cpu()
    given = argument(read.call, "bias")
    if given is None and name in folding.biases:
        given = editor.read(folding.biases[name][0])
        _give_bias(read.call, given)
    elif given is None:
        path = name.removesuffix(".weight")
        given = editor.parameter(
            editor.fresh(f"{path}.bias"),
            torch.zeros_like(shift, dtype=value.dtype, device=value.device),
            like=read.tensor,
            frozen=True,
            part=NodeRole.BIAS,
        )
        _give_bias(read.call, given)
    folding.shifts[str(given.target)] = shift
    folding.biases[name] = (str(given.target), read.dim, bias)


def _between(
    kind: str, matrix: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The matrix and shift that a product of one kind needs, for a value that lacks the weight and bias of a norm."""
    if kind == TO_STREAM:
        return matrix, None
    back = matrix.T * weight
    if kind == WHOLE_OUTPUT:
        return back, bias
    return back @ matrix, None if bias is None else bias @ matrix


def _product(
    editor: Editor,
    plan: StreamPlan,
    bridge: Bridge,
    by: tuple[torch.Tensor, torch.Tensor | None],
) -> fx.Node:
    """value @ matrix + shift, in front of a call; not as a linear, so that no pass rounds or prunes it."""
    value, site = bridge.value, plan.site
    returned = bridge.user.op == "output"

    def stored(name: str, tensor: torch.Tensor) -> fx.Node:
        dtype = value.meta["val"].dtype
        return editor.parameter(
            editor.fresh(f"{site}_{name}"),
            tensor.to(dtype).to(editor.program.device).contiguous(),
            frozen=True,
            part=NodeRole.ROTATION,
        )

    matrix, shift = by
    made = value
    calls = [(aten.matmul.default, "rotation", matrix)]
    calls += [] if shift is None else [(aten.add.Tensor, "rotated_bias", shift)]
    for target, name, tensor in calls:
        made = editor.call(
            target,
            made,
            stored(name, tensor),
            like=value if returned else bridge.user,
            after=made if returned else None,
            site=site,
            part=NodeRole.ROTATION,
        )
    return made


def _empty(program: Program, pending: Pending, folding: Folding) -> None:
    """Let the weight of a norm be ones and its bias zeros."""
    for item, wanted in zip(pending, (1.0, 0.0)):
        if item is None:
            continue
        names = [str(node.target) for node in upstream(item) if node.op == "get_attr"]
        for number in (wanted, 0.0, 1.0):
            if len(names) == 1 and _is_constant(program, item, names[0], number, wanted):
                folding.whole[names[0]] = number
                break
        else:
            raise PassError(
                f"{', '.join(names)}: the expression of this norm's weight cannot become {wanted:g}"
            )


def _is_constant(program: Program, item: fx.Node, name: str, number: float, wanted: float) -> bool:
    """Whether an expression of one parameter is a number everywhere, if the parameter is one."""
    tried = program.clone()
    tried.parameters[name] = torch.full_like(in_memory(program.tensor(name)), number)
    return bool((evaluate(tried, item) == wanted).all())


def _give_bias(call: fx.Node, bias: fx.Node) -> None:
    """Let a linear, or one of experts, read a bias."""
    place = place_of(call.target, "bias")
    assert place is not None
    assert len(call.args) >= place
    call.args = (*call.args[:place], bias, *call.args[place + 1 :])
