"""Split a mean loss into a sum and a count, so that ranks with unequal numbers of items compute the global mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from bmgraph.errors import InputError
from bmgraph.ir.editor import Editor
from bmgraph.ir.program import Program, output_node
from bmgraph.ir.shape_inference import value

aten = torch.ops.aten

MEAN, SUM = 1, 2
"""torch's codes for the reductions of a loss."""

Loss = Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]
"""(outputs by name, inputs by name) -> (summed loss, number of items in the sum), two scalars."""

Terms = tuple[fx.Node, fx.Node]
"""(summed loss, number of items in the sum), two scalars."""


def split_loss(program: Program, name: str) -> Program:
    """A copy of the program that returns the sum and the count of a mean loss instead of its outputs.

    The loss is the output `name`. Raises InputError if there is no such output, or if it is not a mean that ranks can
    share.
    """
    names = [spec.name for spec in program.outputs]
    if name not in names:
        known = ", ".join(program.losses) or "none"
        raise InputError(
            f"loss={name!r}: the program has no such output (its losses: {known}); "
            "capture it with labels in the example, or give a function of (outputs, inputs)"
        )
    split = program.clone()
    returned: Any = output_node(split.graph).args[0]
    node = returned[names.index(name)]
    if value(node).dim() != 0:
        raise InputError(
            f"loss={name!r}: that output has shape {list(value(node).shape)}, a loss is a scalar"
        )
    with split.edit(by="loss") as editor:
        total, count = _terms(editor, node, name)
        output_node(split.graph).args = ((total, count, *returned[len(names) :]),)
    return split


def _terms(editor: Editor, node: fx.Node, name: str) -> Terms:
    """The terms of a mean, behind any scaling or conversion by constants."""
    split = MEANS.get(node.target)
    if split is not None:
        terms = split(editor, node)
        if terms is not None:
            return terms
    is_scaling = node.target in SCALINGS and not node.kwargs and not _has_nodes(node.args[1:])
    if is_scaling and isinstance(node.args[0], fx.Node):
        total, count = _terms(editor, node.args[0], name)
        return _same_op(editor, node, total, *node.args[1:]), count
    raise InputError(
        f"loss={name!r} ends in {node.target}, which is not a mean over items that ranks can share: "
        "give loss= a function of (outputs, inputs) that returns (sum, count)"
    )


def _has_nodes(arguments: tuple[Any, ...]) -> bool:
    return any(isinstance(argument, fx.Node) for argument in arguments)


def _cross_entropy(editor: Editor, node: fx.Node) -> Terms | None:
    """cross_entropy_loss(logits, target, weight, reduction, ignore_index, label_smoothing)"""
    arguments = _arguments(node, (None, None, None, MEAN, -100, 0.0))
    logits, target, weight, reduction, ignored, smoothing = arguments
    if weight is not None or reduction != MEAN or value(target).is_floating_point():
        return None
    total = _same_op(editor, node, logits, target, None, SUM, ignored, smoothing)
    return total, _count_valid(editor, target, ignored, node)


def _nll(editor: Editor, node: fx.Node) -> Terms | None:
    """nll_loss(log_probabilities, target, weight, reduction, ignore_index)"""
    log_probabilities, target, weight, reduction, ignored = _arguments(node, (None, None, None, MEAN, -100))
    if weight is not None or reduction != MEAN:
        return None
    total = _same_op(editor, node, log_probabilities, target, None, SUM, ignored)
    return total, _count_valid(editor, target, ignored, node)


def _same_op(editor: Editor, node: fx.Node, *args: Any) -> fx.Node:
    """A call of the node's operator with other arguments."""
    assert callable(node.target)
    return editor.call(node.target, *args, like=node)


def _count_valid(editor: Editor, target: fx.Node, ignored: int, like: fx.Node) -> fx.Node:
    """The number of labels that are not the ignored one."""
    valid = editor.call(aten.ne.Scalar, target, ignored, like=like)
    return editor.call(aten.sum.default, valid, like=like)


def _elementwise(reduction: int) -> Callable[[Editor, fx.Node], Terms | None]:
    """The split of a mean over all elements; `reduction` is the position of that argument."""

    def split(editor: Editor, node: fx.Node) -> Terms | None:
        given = len(node.args)
        arguments = [*node.args, *[None] * (reduction - given), MEAN][: max(reduction + 1, given)]
        if arguments[reduction] != MEAN or node.kwargs:
            return None
        total = _same_op(editor, node, *arguments[:reduction], SUM, *arguments[reduction + 1 :])
        return total, _count_elements(editor, node.args[0], node)

    return split


def _mean(editor: Editor, node: fx.Node) -> Terms | None:
    if len(node.args) > 1 or node.kwargs:
        return None
    return editor.call(aten.sum.default, node.args[0], like=node), _count_elements(editor, node.args[0], node)


def _quotient(editor: Editor, node: fx.Node) -> Terms | None:
    """A sum divided by another sum that depends on no parameter."""
    total, count = node.args[0], node.args[1]
    if not isinstance(total, fx.Node) or not isinstance(count, fx.Node) or node.kwargs:
        return None
    if total.target is not aten.sum.default or count.target is not aten.sum.default:
        return None
    return None if _reads_parameters(editor.program, count) else (total, count)


def _count_elements(editor: Editor, tensor: Any, like: fx.Node) -> fx.Node:
    ones = editor.call(aten.ones_like.default, tensor, dtype=torch.int64, like=like)
    return editor.call(aten.sum.default, ones, like=like)


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
        if item not in seen and item.target not in SIZE_ONLY:
            seen.add(item)
            stack.extend(item.all_input_nodes)
    return False


MEANS: dict[Any, Callable[[Editor, fx.Node], Terms | None]] = {
    aten.cross_entropy_loss.default: _cross_entropy,
    aten.nll_loss.default: _nll,
    aten.nll_loss_nd.default: _nll,
    aten.mse_loss.default: _elementwise(2),
    aten.l1_loss.default: _elementwise(2),
    aten.huber_loss.default: _elementwise(2),
    aten.smooth_l1_loss.default: _elementwise(2),
    aten.binary_cross_entropy_with_logits.default: _elementwise(4),
    aten.mean.default: _mean,
    aten.div.Tensor: _quotient,
}
"""By operator: returns the terms of a mean, or None if the call is not a plain mean."""

SIZE_ONLY = frozenset(
    {aten.ones_like.default, aten.zeros_like.default, aten.full_like.default, aten.sym_size.int}
)
"""Operators that read the sizes of a tensor but not its values."""

SCALINGS = (aten.mul.Tensor, aten.div.Tensor, aten.to.dtype, aten.neg.default)
"""Operators that can be applied to the sum instead of the mean, if their other arguments are constants."""
