"""Split a mean loss into a sum and a count, so that ranks with unequal numbers of items compute the global mean.

Where no ranks share a batch, a loss that is no such mean is taken as it is, and counts as one item.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from bmgraph.errors import InputError
from bmgraph.ir.editor import Editor
from bmgraph.ir.program import Program, output_node
from bmgraph.ir.shape_inference import value
from bmgraph.ops.trait_row import Dims, Kind
from bmgraph.ops.traits import argument, calls, place_of, traits_of

aten = torch.ops.aten

MEAN, SUM = 1, 2
"""torch's codes for the reductions of a loss."""

Loss = Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]
"""(outputs by name, inputs by name) -> (summed loss, number of items in the sum), two scalars."""

Terms = tuple[fx.Node, fx.Node]
"""(summed loss, number of items in the sum), two scalars."""


def split_loss(program: Program, name: str, shared: bool = True, several: bool = False) -> Program:
    """A copy of the program that returns the sum and the count of a mean loss instead of its outputs.

    The loss is the output `name`. Raises InputError if there is no such output, or if ranks `shared` the batch and it is
    not a mean that they can share; without `shared` any other scalar is returned as it is, with a count of one.
    `several`: counts are summed over ranks although these bring rows of their own.
    """
    split = program.clone()
    returned: Any = output_node(split.graph).args[0]
    node = loss_node(split, name)
    with split.edit(by="loss") as editor:
        terms = mean_terms(editor, node, shared or several)
        if terms is None and shared:
            raise InputError(
                f"loss={name!r} ends in {node.target}, which is not one mean over items that ranks or micro-batches can share: "
                "give loss= a function of (outputs, inputs) that returns (sum, count), train on one rank, or let the loss of "
                'each rank\'s own rows count as one with Torch(batch="rank"); either without accumulate'
            )
        if terms is None:
            terms = node, editor.call(aten.ones_like.default, node, dtype=torch.int64, like=node, after=node)
        total, count = terms
        output_node(split.graph).args = ((total, count, *returned[len(program.outputs) :]),)
    return split


def loss_alone(program: Program, name: str) -> Program:
    """A copy of the program that returns the output `name` alone, whole."""
    alone = program.clone()
    with alone.edit(by="loss"):
        returned: Any = output_node(alone.graph).args[0]
        output_node(alone.graph).args = ((loss_node(alone, name), *returned[len(program.outputs) :]),)
    return alone


def loss_node(program: Program, name: str) -> fx.Node:
    """The scalar output `name`. Raises InputError if there is none."""
    names = [spec.name for spec in program.outputs]
    if name not in names:
        known = ", ".join(program.losses) or "none"
        raise InputError(
            f"loss={name!r}: the program has no such output (its losses: {known}); "
            "capture it with labels in the example, or give a function of (outputs, inputs)"
        )
    returned: Any = output_node(program.graph).args[0]
    node: fx.Node = returned[names.index(name)]
    if value(node).dim() != 0:
        raise InputError(
            f"loss={name!r}: that output has shape {list(value(node).shape)}, a loss is a scalar"
        )
    return node


def mean_terms(editor: Editor, node: fx.Node, shared: bool) -> Terms | None:
    """The terms of a mean, behind any scaling or conversion by constants; None if it is no mean."""
    if node.target is aten.div.Tensor:
        terms = _quotient(editor, node, shared)
    else:
        split = _split_of(node)
        terms = None if split is None else split(editor, node)
    if terms is not None:
        return terms
    is_constant = not node.kwargs and not _has_nodes(node.args[1:])
    if not is_constant or not isinstance(node.args[0], fx.Node) or not (scales(node) or _offsets(node)):
        return None
    terms = mean_terms(editor, node.args[0], shared)
    if terms is None:
        return None
    total, count = terms
    if scales(node):
        return same_op(editor, node, total, *node.args[1:]), count
    offset = editor.call(aten.mul.Tensor, count, node.args[1], like=node)
    target: Any = node.target
    return editor.call(target.overloadpacket.Tensor, total, offset, like=node), count


def scales(node: fx.Node) -> bool:
    """Whether a call with constants can be applied to the sum instead of the mean."""
    row = traits_of(node)
    by_factor = row.kind is Kind.SCALING or node.target is aten.div.Tensor
    return by_factor or (row.linear and row.dims is Dims.ELEMENTWISE)


def _offsets(node: fx.Node) -> bool:
    """Whether a call with a constant adds it to a mean, or takes one from the other."""
    return traits_of(node).kind in (Kind.SUM, Kind.DIFFERENCE)


def _split_of(node: fx.Node) -> Callable[[Editor, fx.Node], Terms | None] | None:
    """What splits a mean by the operator of a call: it returns the terms, or None if the call is not a plain mean."""
    if node.target is aten.mean.default:
        return _mean
    if traits_of(node).kind is not Kind.LOSS:
        return None
    if place_of(node.target, "label_smoothing") is not None:
        return _cross_entropy
    if place_of(node.target, "ignore_index") is not None:
        return _nll
    return _elementwise


def _has_nodes(arguments: tuple[Any, ...]) -> bool:
    return any(isinstance(argument, fx.Node) for argument in arguments)


def _cross_entropy(editor: Editor, node: fx.Node) -> Terms | None:
    """cross_entropy_loss(logits, target, weight, reduction, ignore_index, label_smoothing)"""
    arguments = _arguments(node, (None, None, None, MEAN, -100, 0.0))
    logits, target, weight, reduction, ignored, smoothing = arguments
    if reduction != MEAN or _trains(editor, weight):
        return None
    total = same_op(editor, node, logits, target, weight, SUM, ignored, smoothing)
    if value(
        target
    ).is_floating_point():  # probabilities of classes: a mean over all items, whatever they weigh
        one_class = editor.call(aten.select.int, target, min(1, value(target).dim() - 1), 0, like=node)
        return total, _count_elements(editor, one_class, node)
    return total, _count_valid(editor, target, weight, ignored, node)


def _nll(editor: Editor, node: fx.Node) -> Terms | None:
    """nll_loss(log_probabilities, target, weight, reduction, ignore_index)"""
    log_probabilities, target, weight, reduction, ignored = _arguments(node, (None, None, None, MEAN, -100))
    if reduction != MEAN or _trains(editor, weight):
        return None
    total = same_op(editor, node, log_probabilities, target, weight, SUM, ignored)
    return total, _count_valid(editor, target, weight, ignored, node)


def _trains(editor: Editor, weight: fx.Node | None) -> bool:
    return weight is not None and _reads_parameters(editor.program, weight)


def same_op(editor: Editor, node: fx.Node, *args: Any) -> fx.Node:
    """A call of the node's operator with other arguments."""
    assert callable(node.target)
    return editor.call(node.target, *args, like=node)


def _count_valid(
    editor: Editor, target: fx.Node, weight: fx.Node | None, ignored: int, like: fx.Node
) -> fx.Node:
    """The number of labels that are not the ignored one, or the sum of the weights of their classes."""
    valid = editor.call(aten.ne.Scalar, target, ignored, like=like)
    if weight is not None:
        classes = editor.call(aten.where.ScalarOther, valid, target, 0, like=like)
        weights = editor.call(aten.index.Tensor, weight, [classes], like=like)
        valid = editor.call(aten.mul.Tensor, weights, valid, like=like)
    return editor.call(aten.sum.default, valid, like=like)


def _elementwise(editor: Editor, node: fx.Node) -> Terms | None:
    """The terms of a mean over all elements of two operands."""
    reduction, given = place_of(node.target, "reduction"), len(node.args)
    assert reduction is not None
    arguments = [*node.args, *[None] * (reduction - given), MEAN][: max(reduction + 1, given)]
    if arguments[reduction] != MEAN or any(key != "log_target" for key in node.kwargs):
        return None
    target: Any = node.target
    keywords: dict[str, Any] = dict(node.kwargs)
    total = editor.call(
        target, *arguments[:reduction], SUM, *arguments[reduction + 1 :], like=node, **keywords
    )
    one, other = _ones(editor, node.args[0], node), _ones(editor, node.args[1], node)
    both = (
        one if value(one).shape == value(other).shape else editor.call(aten.mul.Tensor, one, other, like=node)
    )
    return total, editor.call(aten.sum.default, both, like=node)


def _mean(editor: Editor, node: fx.Node) -> Terms | None:
    if len(node.args) > 1 or node.kwargs:
        return None
    return editor.call(aten.sum.default, node.args[0], like=node), _count_elements(editor, node.args[0], node)


def _quotient(editor: Editor, node: fx.Node, shared: bool) -> Terms | None:
    """A sum divided by a size, or by another sum that depends on no parameter, which may be kept at 1 or more."""
    total, divisor = node.args[0], node.args[1]
    if (
        not isinstance(total, fx.Node)
        or not isinstance(divisor, fx.Node)
        or node.kwargs
        or not _is_sum(total)
    ):
        return None
    if not isinstance(value(divisor), torch.Tensor):
        ones = editor.call(aten.ones.default, [divisor], dtype=torch.int64, like=node)
        return total, editor.call(aten.sum.default, ones, like=node)
    count = divisor
    while isinstance(count, fx.Node) and (_is_clamp(count) or count.target is aten.to.dtype):
        count = count.args[0]  # type: ignore[assignment]
    if not isinstance(count, fx.Node) or count.target is not aten.sum.default:
        return None
    clamped = any(map(_is_clamp, _between(divisor, count)))
    if _reads_parameters(editor.program, count) or (clamped and shared and not _is_whole(count)):
        return None
    # without items the clamped count of several ranks would be their number; then no step is taken at all
    return total, count if shared or not clamped else divisor


def _is_sum(node: fx.Node) -> bool:
    """Whether a scalar is a sum: by that operator, or a loss that is summed."""
    if node.target is aten.to.dtype or node.target is aten.neg.default:
        return isinstance(node.args[0], fx.Node) and _is_sum(node.args[0])
    if node.target is aten.sum.default:
        return True
    return traits_of(node).kind is Kind.LOSS and argument(node, "reduction") == SUM


def _is_clamp(node: fx.Node) -> bool:
    """clamp(x, 1), or another lower bound that a number of items which is not 0 cannot be under."""
    if not calls(node, aten.clamp, aten.clamp_min) or len(node.args) > 2:
        return False
    low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
    return set(node.kwargs) <= {"min"} and isinstance(low, (int, float)) and 0 < low <= 1


def _between(last: fx.Node, first: fx.Node) -> list[fx.Node]:
    """The calls of one operand from the last to the one after the first."""
    found = []
    while last is not first:
        found.append(last)
        last = last.args[0]  # type: ignore[assignment]
    return found


def _is_whole(node: fx.Node) -> bool:
    """Whether a value holds whole numbers alone, by its dtype or by what it is made of."""
    dtype = value(node).dtype
    if not dtype.is_floating_point and not dtype.is_complex:
        return True
    tensors = node.all_input_nodes
    numbers = [item for item in node.args if isinstance(item, float)]
    whole = traits_of(node).whole and all(number.is_integer() for number in numbers)
    return whole and bool(tensors) and all(map(_is_whole, tensors))


def _ones(editor: Editor, tensor: Any, like: fx.Node) -> fx.Node:
    return editor.call(aten.ones_like.default, tensor, dtype=torch.int64, like=like)


def _count_elements(editor: Editor, tensor: Any, like: fx.Node) -> fx.Node:
    return editor.call(aten.sum.default, _ones(editor, tensor, like), like=like)


def _arguments(node: fx.Node, defaults: tuple[Any, ...]) -> list[Any]:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(names, node.args)), **node.kwargs}
    return [given.get(name, default) for name, default in zip(names, defaults)]


def _reads_parameters(program: Program, node: fx.Node) -> bool:
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        item = stack.pop()
        if item.op == "get_attr" and str(item.target) in program.parameters:
            return True
        if item not in seen and traits_of(item).dims is not Dims.SIZES_ALONE:
            seen.add(item)
            stack.extend(item.all_input_nodes)
    return False
