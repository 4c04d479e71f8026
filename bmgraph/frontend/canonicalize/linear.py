"""Rewrite every matrix product with a weight as `aten.linear(x, weight, bias)`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.weight_ranges import region_of
from bmgraph.ir.editor import Editor
from bmgraph.ir.matching import equal_sizes

aten = torch.ops.aten


def fold_linears(editor: Editor) -> None:
    """Rewrite `addmm`, `mm` and `matmul` with a weight as `linear`, with `t` on a weight that is stored [in, out].

    A weight is a parameter, a part of one, or computed from parameters alone.
    """
    weights = _weights(editor)
    computed = _computed_weights(editor, weights)
    parts = {node for node in computed if region_of(editor.program, node) is not None}
    for node in list(editor.graph.nodes):
        _fold_weight_on_left(editor, node, weights | parts)
    for node in list(editor.graph.nodes):
        found = _product(node, weights) or _product(node, computed, weights)
        if found is None:
            continue
        x, weight, bias = found
        weight = _transposed(editor, weight, node)
        arguments = (x, weight) if bias is None else (x, weight, bias)
        new = editor.call(aten.linear.default, *arguments, like=node)
        editor.replace(node, new)
        editor.graph.erase_node(node)
    for node in list(editor.graph.nodes):
        if node.target is aten.linear.default:
            _fold_bias(editor, node, weights)
    for node in list(editor.graph.nodes):
        if node.target is aten.linear.default:
            _drop_reshapes(editor, node)


def _weights(editor: Editor) -> set[fx.Node]:
    """Nodes that hold a parameter of the model, plain or transposed."""
    found: set[fx.Node] = set()
    for node in editor.graph.nodes:
        if (node.op == "get_attr" and str(node.target) in editor.program.parameters) or (
            _is_transpose(node) and node.args[0] in found
        ):
            found.add(node)
    return found


def _computed_weights(editor: Editor, plain: set[fx.Node]) -> set[fx.Node]:
    """Matrices that are computed from tensors of the model, a parameter among them, and from no input."""
    trained: dict[fx.Node, bool] = {}
    found: set[fx.Node] = set()
    for node in editor.graph.nodes:
        if node.op == "get_attr":
            trained[node] = str(node.target) in editor.program.parameters
        elif node.op == "call_function":
            inputs = node.all_input_nodes
            if not inputs or not all(item in trained for item in inputs):
                continue
            trained[node] = any(trained[item] for item in inputs)
            value = node.meta.get("val")
            if trained[node] and node not in plain and isinstance(value, torch.Tensor):
                found |= {node} if value.dim() == 2 and value.is_floating_point() else set()
    return found


def _is_transpose(node: fx.Node) -> bool:
    """Whether a call swaps the two dimensions of a matrix."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    if node.target is aten.t.default or node.target is aten.numpy_T.default:
        return True
    if node.meta["val"].dim() != 2:
        return False
    if node.target is aten.transpose.int:
        return {axis % 2 for axis in node.args[1:3]} == {0, 1}  # type: ignore[operator]
    return node.target is aten.permute.default and [axis % 2 for axis in node.args[1]] == [1, 0]  # type: ignore[union-attr,operator]


def _product(
    node: fx.Node, weights: set[fx.Node], others: Collection[fx.Node] = ()
) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """x, the weight [in, out] and the bias of a product of x, no weight and not among `others`, with a weight; None if the
    call is not one."""
    arguments: Any = node.args
    if node.target is aten.addmm.default and not node.kwargs:
        bias, x, weight = arguments
        if weight in weights and isinstance(bias, fx.Node) and bias.meta["val"].dim() == 1:
            return x, weight, bias
    if node.target in (aten.mm.default, aten.matmul.default):
        x, weight = arguments
        if (
            weight in weights
            and x not in weights
            and x not in others
            and weight.meta["val"].dim() == 2
            and x.meta["val"].dim() >= 2
        ):
            return x, weight, None
    return None


def _fold_weight_on_left(editor: Editor, node: fx.Node, weights: set[fx.Node]) -> None:
    """Rewrite weight @ x as the transpose of a linear on the transpose of x."""
    if node.target not in (aten.mm.default, aten.matmul.default):
        return
    weight, x = node.args
    if weight not in weights or x in weights or weight.meta["val"].dim() != 2 or x.meta["val"].dim() < 2:  # type: ignore[union-attr]
        return
    columns = editor.call(aten.transpose.int, x, -1, -2, like=node)
    product = editor.call(aten.linear.default, columns, weight, like=node)
    editor.replace(node, editor.call(aten.transpose.int, product, -1, -2, like=node))
    editor.graph.erase_node(node)


def _transposed(editor: Editor, weight: fx.Node, like: fx.Node) -> fx.Node:
    """The weight [out, in] that `linear` takes, from the [in, out] of a product."""
    if _is_transpose(weight):
        inner = weight.args[0]
        assert isinstance(inner, fx.Node)
        return inner
    return editor.call(aten.t.default, weight, like=like)


def _fold_bias(editor: Editor, node: fx.Node, weights: set[fx.Node]) -> None:
    """Fold the addition of a parameter vector into the linear, if nothing else reads the product."""
    if (len(node.args) > 2 and node.args[2] is not None) or len(node.users) != 1:
        return
    user = next(iter(node.users))
    if user.target is not aten.add.Tensor or user.kwargs:
        return
    other: Any = user.args[1] if user.args[0] is node else user.args[0]
    if other not in weights or other.meta["val"].shape != node.meta["val"].shape[-1:]:
        return
    new = editor.call(aten.linear.default, node.args[0], node.args[1], other, like=node, before=user)
    editor.replace(user, new)
    editor.graph.erase_node(user)
    editor.graph.erase_node(node)


def _drop_reshapes(editor: Editor, node: fx.Node) -> None:
    """Replace reshape -> linear -> reshape by one linear, if the reshapes only flatten and restore leading dimensions."""
    before = node.args[0]
    if (
        not isinstance(before, fx.Node)
        or before.target is not aten.reshape.default
        or before.meta["val"].dim() != 2
    ):
        return
    source = before.args[0]
    assert isinstance(source, fx.Node)
    shape = source.meta["val"].shape
    if len(shape) < 3 or shape[-1] != before.meta["val"].shape[-1]:
        return
    for after in list(node.users):
        if after.target is not aten.reshape.default:
            continue
        wanted = after.meta["val"].shape
        same = len(wanted) == len(shape) and all(equal_sizes(a, b) for a, b in zip(wanted[:-1], shape[:-1]))
        if same and wanted[-1] == node.meta["val"].shape[-1]:
            new = editor.call(aten.linear.default, source, *node.args[1:], like=node, before=after)
            editor.replace(after, new)
            editor.graph.erase_node(after)
