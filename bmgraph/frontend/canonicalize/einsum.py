"""Rewrite the einsums of an attention as matrix products, so that it is found however it was written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from bmgraph.ir.editor import Editor
from bmgraph.ir.matching import only_user

aten = torch.ops.aten

SOFTMAXES = (aten.softmax.int, aten._softmax.default)
BEFORE = (
    aten.to.dtype, aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.where.self,
    aten.masked_fill.Scalar,
)  # fmt: skip
"""What stands between the product of queries and keys and the softmax: scale, mask, bias."""

AFTER = (aten.to.dtype, aten.dropout.default)
"""What stands between the softmax and the product with the values."""


def rewrite_attention_einsums(editor: Editor) -> None:
    """Rewrite einsums of two operands before and after a softmax, if they are batched products of matrices."""
    for node in list(editor.graph.nodes):
        if node.target in SOFTMAXES:
            for einsum in dict.fromkeys((*_before(node), *_after(node))):
                _rewrite(editor, einsum)


def _before(softmax: fx.Node) -> Iterator[fx.Node]:
    left, seen = list(softmax.args[:1]), set[fx.Node]()
    while left:
        node: Any = left.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.target is aten.einsum.default:
            yield node
        elif node.target in BEFORE:
            left += node.args


def _after(softmax: fx.Node) -> Iterator[fx.Node]:
    node: fx.Node | None = only_user(softmax)
    while node is not None and node.target in AFTER:
        node = only_user(node)
    if node is not None and node.target is aten.einsum.default:
        yield node


def _rewrite(editor: Editor, einsum: fx.Node) -> None:
    equation, operands = einsum.args[0], einsum.args[1]
    assert isinstance(equation, str)
    assert isinstance(operands, (list, tuple))
    orders = _orders(equation)
    if orders is None or len(operands) != 2:
        return
    first, second, result = orders
    factors = [_permuted(editor, item, order, einsum) for item, order in zip(operands, (first, second))]
    product = editor.call(aten.matmul.default, *factors, like=einsum)
    editor.replace(einsum, _permuted(editor, product, result, einsum))
    editor.graph.erase_node(einsum)  # else what it reads has one reader too many to be folded


def _orders(equation: str) -> tuple[list[int], list[int], list[int]] | None:
    """How to permute two operands so that matmul multiplies them, and the product so that it is the einsum's result.

    None unless all labels differ within an operand, and both have the same batch axes, one axis of their own and one that is
    summed.
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if (
        not arrow
        or len(terms) != 2
        or "." in equation
        or any(len(set(term)) != len(term) for term in (*terms, output))
    ):
        return None
    one, other = terms
    shared = [label for label in output if label in one and label in other]
    summed = [label for label in one if label in other and label not in output]
    rows = [label for label in output if label in one and label not in other]
    columns = [label for label in output if label in other and label not in one]
    known = {*shared, *summed, *rows, *columns}
    if (len(summed), len(rows), len(columns)) != (1, 1, 1) or not shared or known != {*one, *other}:
        return None
    made = [*shared, *rows, *columns]
    return (
        [one.index(label) for label in (*shared, *rows, *summed)],
        [other.index(label) for label in (*shared, *summed, *columns)],
        [made.index(label) for label in output],
    )


def _permuted(editor: Editor, node: Any, order: list[int], like: fx.Node) -> Any:
    if order == sorted(order):
        return node
    return editor.call(aten.permute.default, node, order, like=like)
