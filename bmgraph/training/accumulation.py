"""The graphs of a step whose batch is split into micro-batches: all but the last add up what the last one reduces.

Gradients are added where they live. What an all-reduce makes whole (ZeRO 0 and 1) is added up on each rank and reduced once,
by the last micro-batch; what is reduce-scattered (ZeRO 2 and 3) is reduced in every one, since the sum over micro-batches
would need room for all gradients whole. Sums are in float32 where gradients are in half precision.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from bmgraph.ir.program import output_node
from bmgraph.ops.trait_row import Dims, Kind
from bmgraph.ops.traits import traits_of
from bmgraph.training.fp32_form import HALVES
from bmgraph.training.step_program import TENSOR, StepProgram
from bmgraph.utils.graph_copies import copy_nodes

aten = torch.ops.aten
collective = torch.ops._c10d_functional

SUM = "(sum)."
"""Begins the names of the sums over micro-batches, which the graphs read beside the step's tensors."""

VIEWS = (Kind.RESHAPE, Kind.LAYOUT, Kind.SELECTION, Kind.SPLIT, Kind.CAST)


@dataclass(frozen=True)
class MicroSteps:
    """The step for the first micro-batch, for those in the middle and for the last.

    The first two return the sums, in order, then the new values of buffers; the graphs of the last two read the sums so far
    under `names` and change them in place. The last returns what the step returns.
    """

    first: StepProgram
    middle: StepProgram
    last: StepProgram
    names: tuple[str, ...]


def micro_steps(step: StepProgram) -> MicroSteps:
    """The graphs of a step for micro-batches; the step itself stays as it is."""
    first, middle, last = _copy(step), _copy(step), _copy(step)
    count = len(_points(step))
    names = tuple(f"{SUM}{index}" for index in range(count))
    _return_sums(first, ())
    _return_sums(middle, names)
    for point, name in zip(_points(last), names):
        _add_before(last, point, name)
    last.graph.lint()
    return MicroSteps(first, middle, last, names)


@dataclass(frozen=True)
class _Point:
    """A value that micro-batches add up: a returned one, or what its all-reduce takes."""

    value: fx.Node
    reduction: fx.Node | None
    places: tuple[int, ...]
    """Places among the returned values, if there is no reduction."""


def _copy(step: StepProgram) -> StepProgram:
    copy = replace(step, graph=fx.Graph())
    copy.graph.output(copy_nodes(copy.graph, step.graph, {}))
    return copy


def _points(step: StepProgram) -> list[_Point]:
    """What is added up, each value once: two parameters may share one gradient, and loss and count one reduction."""
    found: dict[fx.Node, _Point] = {}
    for place, returned in enumerate(step.returned()[: 2 + len(step.trained)]):
        reduction = _reduction(returned)
        value = returned if reduction is None else reduction.all_input_nodes[0]
        before = found[value].places if value in found else ()
        places = before if reduction is not None else (*before, place)
        found[value] = _Point(value, reduction, places)
    return list(found.values())


def _reduction(node: fx.Node) -> fx.Node | None:
    """The all-reduce whose result a returned value is, or a part of, if nothing else reads it."""
    while node.op == "call_function":
        if node.target is collective.all_reduce.default:
            return node if node.args[1] == "sum" and _only_returned(node) else None
        looked_through = node.target in (collective.wait_tensor.default, aten.select.int, aten.slice.Tensor)
        if not (looked_through or traits_of(node).kind is Kind.RESHAPE):
            return None
        node = node.all_input_nodes[0]
    return None


def _only_returned(node: fx.Node) -> bool:
    """Whether a value is only returned, whole or in parts."""
    return all(
        user.op == "output"
        or ((user.target is collective.wait_tensor.default or traits_of(user).keeps_values
             or traits_of(user).kind is Kind.SELECTION) and _only_returned(user))
        for user in node.users
    )  # fmt: skip


def _return_sums(step: StepProgram, names: tuple[str, ...]) -> None:
    """Return what is added up, added to the sums so far if they have names, instead of loss, count and gradients."""
    output = output_node(step.graph)
    points = _points(step)
    if names:
        sums = [_added(step, point.value, name) for point, name in zip(points, names)]
    else:
        sums = [_own(step, point.value) for point in points]
    output.args = ((*sums, *step.returned()[2 + len(step.trained) :]),)
    reductions = {point.reduction for point in points}
    for node in reversed(list(step.graph.nodes)):
        waits = node.target is collective.wait_tensor.default and node.args[0] in reductions
        dropped = node in reductions or waits or not node.is_impure()
        if not node.users and node.op == "call_function" and dropped:
            step.graph.erase_node(node)
    step.graph.lint()


def _own(step: StepProgram, value: fx.Node) -> fx.Node:
    """A value in storage of its own, in the dtype of sums."""
    row = traits_of(value)
    is_view = value.op != "call_function" or row.kind in VIEWS
    is_view |= row.dims in (Dims.MOVED, Dims.PERMUTED, Dims.EXPANDED) or value.target is aten.t.default
    if value.meta["val"].dtype in HALVES:
        return step.call(aten._to_copy.default, value, dtype=torch.float32, before=_after(value))
    if not is_view:
        return value
    return step.call(
        aten.clone.default, value, memory_format=torch.contiguous_format, before=_after(value), like=value
    )


def _added(step: StepProgram, value: fx.Node, name: str) -> fx.Node:
    """The sum so far, to which a value is added in place as soon as it is there."""
    val = value.meta["val"]
    last = [node for node in step.graph.nodes if node.op == "placeholder"][-1]
    with step.graph.inserting_after(last):
        held = step.graph.placeholder("sum")
    held.target = held.name
    held.meta = {TENSOR: name, "val": val.float() if val.dtype in HALVES else val}
    return step.call(aten.add_.Tensor, held, value, before=_after(value), like=value)


def _add_before(step: StepProgram, point: _Point, name: str) -> None:
    """Let the step return, or reduce, a value with the sum of the micro-batches before it."""
    total = _added(step, point.value, name)
    dtype = point.value.meta["val"].dtype
    if dtype in HALVES:
        total = step.call(aten._to_copy.default, total, dtype=dtype, before=total.next)
    if point.reduction is not None:
        point.reduction.replace_input_with(point.value, total)
    returned = list(step.returned())
    for place in point.places:
        returned[place] = total
    output_node(step.graph).args = (tuple(returned),)


def _after(node: fx.Node) -> fx.Node:
    """The node behind a value, and behind all placeholders."""
    following = node.next
    while following.op == "placeholder":
        following = following.next
    return following
