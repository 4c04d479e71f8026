"""Rewrites of single operators, in one table: casts, views, copies and calls without effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.value_ranges import never_negative
from bmgraph.ir.editor import Editor
from bmgraph.ir.matching import END, equal_sizes
from bmgraph.ir.program import tensor_nodes
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import operators_of

aten = torch.ops.aten

DROPPED_KEYWORDS = ("device", "layout", "pin_memory", "non_blocking", "memory_format")

ASSERTIONS = frozenset(
    {
        "_assert_tensor_metadata",
        "_assert_scalar",
        "_assert_async",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
    }
)

Rewrite = Callable[[Editor, fx.Node], fx.Node | None]
"""Returns the replacement of a call, or None to keep the call."""


def rewrite_single_ops(editor: Editor) -> None:
    """Apply `TABLE` to every call in order; drop assertions, and keywords for device, layout and memory."""
    for node in list(editor.graph.nodes):
        if node.op != "call_function":
            continue
        if _operator_name(node) in ASSERTIONS:
            editor.graph.erase_node(node)
            continue
        rewrite = TABLE.get(node.target)
        new = rewrite(editor, node) if rewrite else None
        if new is not None and new is not node:
            node.replace_all_uses_with(new)
            editor.graph.erase_node(node)
            node = new
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            node.kwargs = {key: item for key, item in node.kwargs.items() if key not in DROPPED_KEYWORDS}


def _operator_name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1]
    return getattr(node.target, "__name__", "")


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _drop(editor: Editor, node: fx.Node) -> fx.Node:
    return _source(node)


def _detach(editor: Editor, node: fx.Node) -> fx.Node | None:
    """Drop a detach that no parameter is upstream of: it has no effect."""
    return None if _depends_on_parameter(editor, node) else _source(node)


def _depends_on_parameter(editor: Editor, node: fx.Node) -> bool:
    parameters = {
        reader for name, reader in tensor_nodes(editor.graph).items() if name in editor.program.parameters
    }
    seen: set[fx.Node] = set()
    stack = list(node.all_input_nodes)
    while stack:
        item = stack.pop()
        if item in seen:
            continue
        if item in parameters:
            return True
        seen.add(item)
        stack.extend(item.all_input_nodes)
    return False


def _cast(editor: Editor, node: fx.Node) -> fx.Node:
    """Rewrite any `to` as `aten.to.dtype`; drop it if the dtype stays."""
    source = _source(node)
    wanted = node.meta["val"].dtype
    if source.meta["val"].dtype == wanted:
        return source
    return editor.call(aten.to.dtype, source, wanted, like=node)


def _reshape(editor: Editor, node: fx.Node) -> fx.Node | None:
    if _keeps_type(node):
        return _source(node)
    if node.target is aten.reshape.default:
        return None
    return editor.call(aten.reshape.default, _source(node), node.args[1], like=node)


def _squeeze(editor: Editor, node: fx.Node) -> fx.Node:
    """Name the axes that go, those whose size is always 1: of a free size that is 1 at one time the axis stays."""
    source, axes = _source(node), _argument(node, 1, "dim")
    sizes = source.meta["val"].shape
    asked = range(len(sizes)) if axes is None or not sizes else [axes] if isinstance(axes, int) else axes
    gone = [axis for axis in asked if isinstance(sizes[axis], int) and sizes[axis] == 1]
    if not gone:
        return source
    if len(gone) == 1:
        return editor.call(aten.squeeze.dim, source, gone[0], like=node)
    return editor.call(aten.squeeze.dims, source, gone, like=node)


def _drop_whole_slice(editor: Editor, node: fx.Node) -> fx.Node | None:
    start, end, step = (
        _argument(node, position, name) for position, name in ((2, "start"), (3, "end"), (4, "step"))
    )
    whole = (
        start in (None, 0) and (end is None or (isinstance(end, int) and end >= END)) and step in (None, 1)
    )
    return _source(node) if whole else None


def _add(editor: Editor, node: fx.Node) -> fx.Node | None:
    """Drop `x + 0`; a sum of two booleans is their `or`, which engines do not call a sum."""
    other = node.args[1]
    both = [item.meta["val"].dtype for item in node.all_input_nodes if _is_tensor(item)]
    if node.meta["val"].dtype == torch.bool and both == [torch.bool] * 2:
        return editor.call(aten.logical_or.default, *node.args, like=node)
    plain = isinstance(other, (int, float)) and other == 0 and not isinstance(other, bool)
    return _source(node) if plain and _keeps_type(node) else None


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _rsub(editor: Editor, node: fx.Node) -> fx.Node | None:
    """Cast integers before `1.0 - x`, as the operator does inside: exporters take its operands as they are."""
    source, dtype = _source(node), node.meta["val"].dtype
    if source.meta["val"].dtype == dtype:
        return None
    cast = editor.call(aten.to.dtype, source, dtype, like=node)
    return editor.call(node.target, cast, *node.args[1:], like=node, **dict(node.kwargs))  # type: ignore[arg-type]


def _drop_mul_one(editor: Editor, node: fx.Node) -> fx.Node | None:
    other = node.args[1]
    plain = isinstance(other, (int, float)) and other == 1 and not isinstance(other, bool)
    return _source(node) if plain and _keeps_type(node) else None


def _keeps_type(node: fx.Node) -> bool:
    """Whether a call returns the dtype and sizes of its first argument; adds no guard on symbolic sizes."""
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    same_rank = before.dtype == after.dtype and before.dim() == after.dim()
    return same_rank and all(equal_sizes(a, b) for a, b in zip(before.shape, after.shape))


def _embedding(editor: Editor, node: fx.Node) -> fx.Node | None:
    """Rewrite the rows of a parameter matrix that integer ids select as an embedding, which knows no negative ids.

    An index may count from the end (-1 is the last row), as relative positions do on purpose: it stays.
    """
    weight, indices = node.args[0], node.args[1]
    if (
        not isinstance(weight, fx.Node)
        or weight.op != "get_attr"
        or str(weight.target) not in editor.program.parameters
    ):
        return None
    if not isinstance(indices, (list, tuple)) or len(indices) != 1 or weight.meta["val"].dim() != 2:
        return None
    (ids,) = indices
    if not isinstance(ids, fx.Node) or ids.meta["val"].dtype not in (torch.int64, torch.int32):
        return None
    if not never_negative(editor.program, ids):
        return None
    return editor.call(aten.embedding.default, weight, ids, like=node)


def _drop_expand(editor: Editor, node: fx.Node) -> fx.Node | None:
    return _source(node) if _keeps_type(node) else None


def _drop_quiet_dropout(editor: Editor, node: fx.Node) -> fx.Node | None:
    """Drop a dropout that is off in training, too: its module is in `eval()`."""
    return _source(node) if _argument(node, 2, "train") is False else None


TABLE: dict[Any, Rewrite] = {
    **dict.fromkeys(operators_of(Kind.DROPOUT), _drop_quiet_dropout),
    aten.to.device: _cast,
    aten.to.dtype: _cast,
    aten.to.dtype_layout: _cast,
    aten.to.other: _cast,
    aten._to_copy.default: _cast,
    aten.type_as.default: _cast,
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.contiguous.default: _drop,
    aten.clone.default: _drop,
    aten.alias.default: _drop,
    aten.lift_fresh_copy.default: _drop,
    aten.detach.default: _detach,
    aten.detach_.default: _detach,
    aten.slice.Tensor: _drop_whole_slice,
    aten.add.Tensor: _add,
    aten.rsub.Scalar: _rsub,
    aten.mul.Tensor: _drop_mul_one,
    aten.expand.default: _drop_expand,
    aten.index.Tensor: _embedding,
}
