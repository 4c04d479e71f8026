"""Attention in the forms that OpenVINO computes as torch does: a key head for each query head, and masks of finite numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from bmgraph.backends.onnx.pack_attention import NEARLY_LEAST
from bmgraph.ir.editor import Editor
from bmgraph.ir.evaluation import upstream
from bmgraph.ir.program import Program

aten = torch.ops.aten

SDPA = aten.scaled_dot_product_attention.default
KEY, VALUE, MASK = 1, 2, 3
"""Argument indices of attention."""


def repeat_heads(program: Program) -> int:
    """Repeat the heads of keys and values for the queries that share them, in place, where attention does so itself; returns the count.

    OpenVINO would give query head i the key head i modulo their number, torch gives neighbours the same.
    """
    count = 0
    with program.edit() as editor:
        for node in list(editor.graph.nodes):
            if node.target is not SDPA or not node.kwargs.get("enable_gqa"):
                continue
            heads = node.args[0].meta["val"].shape[1]
            if not isinstance(heads, int):
                continue
            for place in (KEY, VALUE):
                node.update_arg(place, _repeated(editor, node, node.args[place], heads))
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "enable_gqa"}
            count += 1
    return count


def _repeated(editor: Editor, node: fx.Node, x: Any, heads: int) -> fx.Node:
    """x [B, K, T, d] -> [B, heads, T, d]."""
    times, size = heads // x.meta["val"].shape[1], x.meta["val"].shape[-1]
    wide = editor.call(aten.unsqueeze.default, x, 2, like=node)
    wide = editor.call(aten.expand.default, wide, [-1, -1, times, -1, -1], like=node)
    rows, length = (editor.call(aten.sym_size.int, x, axis, like=node) for axis in (0, 2))
    return editor.call(aten.reshape.default, wide, [rows, heads, length, size], like=node)


def hide_by_numbers(program: Program) -> int:
    """Hide keys by a large finite number, in place, where a mask does so by booleans or by -inf; returns the count.

    OpenVINO's attention over a cache gives NaN for a query that sees no key, such as that of a position of padding, and the cache would
    hand it on. Such a query gets 0, as on torch.
    """
    made: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    count = 0
    with program.edit() as editor:
        for node in list(editor.graph.nodes):
            mask: Any = (
                (node.args[MASK] if len(node.args) > MASK else node.kwargs.get("attn_mask"))
                if node.target is SDPA
                else None
            )
            if not isinstance(mask, fx.Node) or not _may_hide_all(program, mask):
                continue
            if mask not in made:
                made[mask] = _finite(editor, mask, node.args[0].meta["val"].dtype)
            finite, sees = made[mask]
            node.replace_input_with(mask, finite)
            kept = editor.call(aten.mul.Tensor, node, sees, like=node, after=node)
            editor.replace(node, kept)
            count += 1
    return count


def _may_hide_all(program: Program, mask: fx.Node) -> bool:
    """Whether a mask is of booleans, or made with -inf."""
    if not mask.meta["val"].is_floating_point():
        return True
    for node in (mask, *upstream(mask)):
        numbers = [item for item in (*node.args, *node.kwargs.values()) if isinstance(item, float)]
        if -math.inf in numbers:
            return True
        if node.op == "get_attr":
            tensor = program.tensor(str(node.target))
            if tensor.is_floating_point() and bool(tensor.isinf().any()):
                return True
    return False


def _finite(editor: Editor, mask: fx.Node, dtype: torch.dtype) -> tuple[fx.Node, fx.Node]:
    """A mask f[..., S, T] whose hidden keys have a large negative number, and f[..., S, 1]: 1 for a query that sees a key, else 0."""
    hides = -NEARLY_LEAST * torch.finfo(dtype).max
    options: dict[str, Any] = {"like": mask}
    if mask.meta["val"].is_floating_point():
        hidden = editor.call(aten.eq.Scalar, mask, -math.inf, **options, after=mask)
        finite = editor.call(aten.masked_fill.Scalar, mask, hidden, hides, **options, after=hidden)
    else:
        hidden = editor.call(aten.logical_not.default, mask, **options, after=mask)
        number = editor.call(aten._to_copy.default, hidden, **options, after=hidden, dtype=dtype)
        finite = editor.call(aten.masked_fill.Scalar, number, hidden, hides, **options, after=number)
    seen = editor.call(aten.logical_not.default, hidden, **options, after=hidden)
    any_seen = editor.call(aten.any.dim, seen, -1, True, **options, after=seen)
    return finite, editor.call(aten._to_copy.default, any_seen, **options, after=any_seen, dtype=dtype)
