"""A mean loss as a sum and a count, so that ranks with unequal shares of a batch agree on the whole batch's mean."""

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
"""How torch numbers the ways of reducing a loss."""

Loss = Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]
"""(outputs by name, inputs by name) -> (summed loss, how many items it is the sum of)."""

Terms = tuple[fx.Node, fx.Node]
"""(summed loss, how many items it is the sum of), both scalars."""


def split_loss(program: Program, name: str) -> Program:
    """The program with nothing but two outputs, `loss_sum` and `loss_count`, whose quotient is the loss of that name.

    Raises InputError where there is no such output or it is no mean that ranks can share.
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
        raise InputError(f"loss={name!r}: that output is {list(value(node).shape)}, a loss is a scalar")
    with split.edit(by="loss") as editor:
        total, count = _terms(editor, node, name)
        output_node(split.graph).args = ((total, count, *returned[len(names) :]),)
    return split


def _terms(editor: Editor, node: fx.Node, name: str) -> Terms:
    """The terms of a mean, looking through what only scales or converts it."""
    split = MEANS.get(node.target)
    if split is not None:
        terms = split(editor, node)
        if terms is not None:
            return terms
    scaled = node.target in SCALINGS and not node.kwargs and not _tensors(node.args[1:])
    if scaled and isinstance(node.args[0], fx.Node):
        total, count = _terms(editor, node.args[0], name)
        return _again(editor, node, total, *node.args[1:]), count
    raise InputError(
        f"loss={name!r} ends in {node.target}, which is no mean over items that ranks can share: "
        "give loss= a function of (outputs, inputs) that returns (sum, count)"
    )


def _tensors(arguments: tuple[Any, ...]) -> bool:
    return any(isinstance(argument, fx.Node) for argument in arguments)


def _cross_entropy(editor: Editor, node: fx.Node) -> Terms | None:
    """cross_entropy_loss(logits, target, weight, reduction, ignore_index, label_smoothing)"""
    arguments = _arguments(node, (None, None, None, MEAN, -100, 0.0))
    logits, target, weight, reduction, ignored, smoothing = arguments
    if weight is not None or reduction != MEAN or value(target).is_floating_point():
        return None
    total = _again(editor, node, logits, target, None, SUM, ignored, smoothing)
    return total, _valid(editor, target, ignored, node)


def _nll(editor: Editor, node: fx.Node) -> Terms | None:
    """nll_loss(log_probabilities, target, weight, reduction, ignore_index)"""
    log_probabilities, target, weight, reduction, ignored = _arguments(node, (None, None, None, MEAN, -100))
    if weight is not None or reduction != MEAN:
        return None
    total = _again(editor, node, log_probabilities, target, None, SUM, ignored)
    return total, _valid(editor, target, ignored, node)


def _again(editor: Editor, node: fx.Node, *args: Any) -> fx.Node:
    """The same operator on other arguments."""
    assert callable(node.target)
    return editor.call(node.target, *args, like=node)


def _valid(editor: Editor, target: fx.Node, ignored: int, like: fx.Node) -> fx.Node:
    kept = editor.call(aten.ne.Scalar, target, ignored, like=like)
    return editor.call(aten.sum.default, kept, like=like)


def _elementwise(place: int) -> Callable[[Editor, fx.Node], Terms | None]:
    """A loss over all elements, whose reduction is its argument at `place`."""

    def split(editor: Editor, node: fx.Node) -> Terms | None:
        arguments = [*node.args, *[None] * (place - len(node.args)), MEAN][: max(place + 1, len(node.args))]
        if arguments[place] != MEAN or node.kwargs:
            return None
        rest = list(node.args[place + 1 :])
        total = _again(editor, node, *arguments[:place], SUM, *rest)
        return total, _elements(editor, node.args[0], node)

    return split


def _mean(editor: Editor, node: fx.Node) -> Terms | None:
    if len(node.args) > 1 or node.kwargs:
        return None
    return editor.call(aten.sum.default, node.args[0], like=node), _elements(editor, node.args[0], node)


def _quotient(editor: Editor, node: fx.Node) -> Terms | None:
    """A sum divided by a count that is made of inputs alone."""
    total, count = node.args[0], node.args[1]
    if not isinstance(total, fx.Node) or not isinstance(count, fx.Node) or node.kwargs:
        return None
    if total.target is not aten.sum.default or count.target is not aten.sum.default:
        return None
    return None if _reads_parameters(editor.program, count) else (total, count)


def _elements(editor: Editor, tensor: Any, like: fx.Node) -> fx.Node:
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
        if item not in seen and item.target not in SIZES_ALONE:
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
"""Operator of a mean -> its terms, None where this call of it is no plain mean."""

SIZES_ALONE = frozenset(
    {aten.ones_like.default, aten.zeros_like.default, aten.full_like.default, aten.sym_size.int}
)
"""Calls that read how large a tensor is, and nothing of what is in it."""

SCALINGS = (aten.mul.Tensor, aten.div.Tensor, aten.to.dtype, aten.neg.default)
"""Calls that keep a mean a mean when their other arguments are constants."""
