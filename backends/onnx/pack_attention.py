"""Before translation: attention on split heads becomes attention on packed rows, its mask read and simplified; where
that cannot be, the mask is brought to the shape that the standard operator takes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

import bmgraph.ops  # noqa: F401  (registers our operators)
from bmgraph.analysis.attention_mask import Mask, read_mask
from bmgraph.ir.editor import Editor
from bmgraph.ir.program import Program

aten = torch.ops.aten


def pack_attention(program: Program) -> int:
    """Rewrite every attention whose heads are split and joined in the usual way; returns their number.

    The mask must say padding, causality, both or nothing: then the expression that made it goes.
    """
    count = 0
    masks: dict[fx.Node | None, Mask | None] = {}
    with program.edit() as editor:
        for node in list(editor.graph.nodes):
            if node.target is aten.scaled_dot_product_attention.default and _pack(editor, node, masks):
                count += 1
    return count


def widen_masks(program: Program) -> None:
    """Give every mask that is the same for all queries a row for each: ONNX's attention takes no other."""
    with program.edit() as editor:
        for node in list(editor.graph.nodes):
            if node.target is not aten.scaled_dot_product_attention.default:
                continue
            mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
            if isinstance(mask, fx.Node) and _has_one_row(mask):
                _widen(editor, node, mask)


def _has_one_row(mask: fx.Node) -> bool:
    rows = mask.meta["val"].shape[-2]
    return isinstance(rows, int) and rows == 1


def _widen(editor: Editor, node: fx.Node, mask: fx.Node) -> None:
    query = node.args[0]
    assert isinstance(query, fx.Node)
    rows: Any = query.meta["val"].shape[-2]
    if not isinstance(rows, int):
        rows = editor.call(aten.sym_size.int, query, 2, like=node)
    shape: list[Any] = [-1] * mask.meta["val"].dim()
    shape[-2] = rows
    wide = editor.call(aten.expand.default, mask, shape, like=node)
    node.replace_input_with(mask, wide)


def _pack(editor: Editor, node: fx.Node, masks: dict[fx.Node | None, Mask | None]) -> bool:
    q, k, v = (_packed(argument) for argument in node.args[:3])
    joined = _joined(node)
    if q is None or k is None or v is None or joined is None or node.kwargs.get("enable_gqa"):
        return False
    heads = node.args[0].meta["val"].shape[1]  # type: ignore[union-attr]
    if not isinstance(heads, int) or any(item.meta["val"].shape[1] != heads for item in node.args[1:3]):  # type: ignore[union-attr]
        return False
    expression: Any = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    if expression not in masks:
        masks[expression] = read_mask(editor.program, expression)
    mask = masks[expression]
    if mask is None:
        return False
    causal = mask.causal or bool(node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False))
    size = node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
    given: Any = node.kwargs.get("scale")
    scale = float(given or 1 / math.sqrt(size))
    padding = None
    if mask.padding is not None:
        padding = next(
            item for item in editor.graph.nodes if item.op == "placeholder" and item.target == mask.padding
        )
    new = editor.call(
        torch.ops.bmgraph.multi_head_attention.default, q, k, v, padding, heads, scale, causal,
        like=node, before=joined,
    )  # fmt: skip
    editor.replace(joined, new)
    return True


def _packed(node: Any) -> fx.Node | None:
    """The rows [B, S, H*d] behind transpose(reshape(x, [B, S, H, d]), 1, 2)."""
    if not isinstance(node, fx.Node) or node.target is not aten.transpose.int or set(node.args[1:]) != {1, 2}:
        return None
    split = node.args[0]
    if (
        not isinstance(split, fx.Node)
        or split.target is not aten.reshape.default
        or split.meta["val"].dim() != 4
    ):
        return None
    rows = split.args[0]
    if not isinstance(rows, fx.Node) or rows.meta["val"].dim() != 3:
        return None
    wide, (heads, size) = rows.meta["val"].shape[-1], split.meta["val"].shape[-2:]
    return rows if isinstance(wide, int) and wide == heads * size else None


def _joined(node: fx.Node) -> fx.Node | None:
    """The rows [B, S, H*e] that the heads are joined to, by one transpose and one reshape."""
    if len(node.users) != 1:
        return None
    swapped = next(iter(node.users))
    if swapped.target is not aten.transpose.int or set(swapped.args[1:]) != {1, 2} or len(swapped.users) != 1:
        return None
    joined = next(iter(swapped.users))
    if joined.target is not aten.reshape.default or joined.meta["val"].dim() != 3:
        return None
    heads, size = node.meta["val"].shape[1], node.meta["val"].shape[-1]
    return joined if joined.meta["val"].shape[-1] == heads * size else None
