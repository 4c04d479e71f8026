"""Prepare attention for export: packed-row attention with a simplified mask, or a mask that ONNX's Attention accepts.

Shapes: B batch, S queries, T keys, H heads, d and e sizes of a head of keys and of values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

import bmgraph.ops  # noqa: F401  (registers our operators)
from bmgraph.analysis.attention_mask import Mask, blind_value, read_mask
from bmgraph.ir.editor import Editor
from bmgraph.ir.matching import equal_sizes
from bmgraph.ir.program import Program

aten = torch.ops.aten

NEARLY_LEAST = 0.99
"""A share of the least number of a dtype: any score is lost in it, too."""


def pack_attention(program: Program) -> int:
    """Replace attention over split heads [B, H, S, d] by attention over packed rows [B, S, H * d]; returns the count.

    Heads must be split and joined by one reshape and one transpose. The mask must encode padding, causality, both or
    neither; the expression that computed it becomes dead.
    """
    count = 0
    masks: dict[fx.Node | None, Mask | None] = {}
    with program.edit() as editor:
        for node in list(editor.graph.nodes):
            if node.target is aten.scaled_dot_product_attention.default and _pack_node(editor, node, masks):
                count += 1
    return count


def fit_attention(program: Program) -> None:
    """Give attention the form that ONNX's Attention takes, in place: four axes, a mask that is not broadcast along
    queries or keys, and no mask with the least number of its dtype."""
    nearly: dict[fx.Node, fx.Node] = {}
    with program.edit() as editor:
        for node in list(editor.graph.nodes):
            if node.target is not aten.scaled_dot_product_attention.default:
                continue
            node = _with_heads(editor, node)
            mask = _mask_of(node)
            if mask is None:
                continue
            if mask.meta["val"].is_floating_point():
                if mask not in nearly:
                    nearly[mask] = _without_least(editor, mask)
                node.replace_input_with(mask, nearly[mask])
                mask = nearly[mask]
            _expand_mask(editor, node, mask)


def _without_least(editor: Editor, mask: fx.Node) -> fx.Node:
    """A mask with NEARLY_LEAST of its dtype instead of the least number.

    ONNX Runtime takes the least number for -inf: a query that sees no key would get 0 instead of a mean of all values.
    """
    least = torch.finfo(mask.meta["val"].dtype).min
    found = editor.call(aten.eq.Scalar, mask, least, like=mask, after=mask)
    return editor.call(aten.masked_fill.Scalar, mask, found, NEARLY_LEAST * least, like=mask, after=found)


def _mask_of(node: fx.Node) -> fx.Node | None:
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    return mask if isinstance(mask, fx.Node) else None


def _with_heads(editor: Editor, node: fx.Node) -> fx.Node:
    """Attention [S, d] or [B, S, d] as attention of one head [B, 1, S, d]; any other as it is."""
    rank = node.meta["val"].dim()
    if rank not in (2, 3):
        return node
    mask = _mask_of(node)
    wide = {
        item: editor.call(aten.unsqueeze.default, item, -3, like=node)
        for item in (*node.args[:3], mask)
        if isinstance(item, fx.Node) and (item is not mask or item.meta["val"].dim() == 3)
    }
    if rank == 2:
        wide |= {item: editor.call(aten.unsqueeze.default, new, 0, like=node) for item, new in wide.items()}
    args = fx.map_arg(node.args, lambda item: wide.get(item, item))
    kwargs: Any = fx.map_arg(node.kwargs, lambda item: wide.get(item, item))
    new = editor.call(aten.scaled_dot_product_attention.default, *args, like=node, **kwargs)
    result = editor.call(aten.squeeze.dim, new, -3, like=node)
    if rank == 2:
        result = editor.call(aten.squeeze.dim, result, 0, like=node)
    editor.replace(node, result)
    return new


def _expand_mask(editor: Editor, node: fx.Node, mask: fx.Node) -> None:
    """Expand a mask's axis of queries or keys that has size 1."""
    found = mask.meta["val"].shape
    shape: list[Any] = [-1] * len(found)
    for axis, source in ((-2, node.args[0]), (-1, node.args[1])):
        assert isinstance(source, fx.Node)
        size: Any = source.meta["val"].shape[-2]
        if not isinstance(found[axis], int) or found[axis] != 1 or (isinstance(size, int) and size == 1):
            continue
        shape[axis] = size if isinstance(size, int) else editor.call(aten.sym_size.int, source, 2, like=node)
    if shape != [-1] * len(found):
        node.replace_input_with(mask, editor.call(aten.expand.default, mask, shape, like=node))


def _pack_node(editor: Editor, node: fx.Node, masks: dict[fx.Node | None, Mask | None]) -> bool:
    """Rewrite one attention node if it qualifies; `masks` caches what was read."""
    q, k, v = (_packed_input(argument) for argument in node.args[:3])
    output = _packed_output(node)
    if q is None or k is None or v is None or output is None or node.kwargs.get("enable_gqa"):
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
    lengths = [item.meta["val"].shape[-2] for item in node.args[:2]]  # type: ignore[union-attr]
    if causal and not equal_sizes(*lengths):
        return False  # kernels align the last query with the last key, torch the first with the first
    blind = blind_value(editor.program, expression, mask)
    if blind is None or (causal and blind not in (-math.inf, torch.finfo(torch.float32).min)):
        return False  # the kernel hides later keys by the least number
    size = node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
    explicit: Any = node.kwargs.get("scale")
    scale = float(explicit or 1 / math.sqrt(size))
    padding = None
    if mask.padding is not None:
        padding = next(
            item for item in editor.graph.nodes if item.op == "placeholder" and item.target == mask.padding
        )
    new = editor.call(
        torch.ops.bmgraph.multi_head_attention.default, q, k, v, padding, heads, scale, causal, None if blind == -math.inf else blind,
        like=node, before=output,
    )  # fmt: skip
    editor.replace(output, new)
    return True


def _packed_input(node: Any) -> fx.Node | None:
    """x [B, S, H * d] of transpose(reshape(x, [B, S, H, d]), 1, 2); None for anything else."""
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
    width, (heads, size) = rows.meta["val"].shape[-1], split.meta["val"].shape[-2:]
    return rows if isinstance(width, int) and width == heads * size else None


def _packed_output(node: fx.Node) -> fx.Node | None:
    """The node [B, S, H * e] that joins the heads by one transpose and one reshape; None if there is none."""
    if len(node.users) != 1:
        return None
    transposed = next(iter(node.users))
    if (
        transposed.target is not aten.transpose.int
        or set(transposed.args[1:]) != {1, 2}
        or len(transposed.users) != 1
    ):
        return None
    joined = next(iter(transposed.users))
    if joined.target is not aten.reshape.default or joined.meta["val"].dim() != 3:
        return None
    heads, size = node.meta["val"].shape[1], node.meta["val"].shape[-1]
    return joined if joined.meta["val"].shape[-1] == heads * size else None
