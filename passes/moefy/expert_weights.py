"""Splits weights and biases into one slice for each expert; entries are moved, never rounded again."""

from __future__ import annotations

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import NodeRole
from bmgraph.passes.moefy.balanced_kmeans import EMPTY
from bmgraph.utils.eight_bits import writable

aten = torch.ops.aten
ours = torch.ops.bmgraph

WEIGHT_CALLS = frozenset({aten.t.default, aten.mul.Tensor, ours.dequantize.default})
"""Calls that a weight may be computed by."""


def is_splittable(weight: fx.Node, users: set[fx.Node]) -> bool:
    """Whether a weight [out, in] is computed from parameters in a way that can be split, and only `users` read it."""
    if not set(weight.users) <= users:
        return False
    if weight.op == "get_attr":
        return True
    if weight.target is ours.dequantize.default:
        codes, scale = weight.args[:2]
        assert isinstance(codes, fx.Node)
        assert isinstance(scale, fx.Node)
        return all(item.op == "get_attr" and set(item.users) == {weight} for item in (codes, scale))
    return weight.target in WEIGHT_CALLS and all(
        isinstance(item, fx.Node) and is_splittable(item, {weight}) for item in weight.args
    )


def split_outputs(editor: Editor, weight: fx.Node, index: torch.Tensor) -> fx.Node:
    """A weight [out, in] as [E, O, in], where expert e takes the outputs index i64[E, O]; EMPTY gives zeros."""
    return _split(editor, weight, index, axis=0, out_first=True)


def split_inputs(editor: Editor, weight: fx.Node, index: torch.Tensor) -> fx.Node:
    """A weight [out, in] as [E, out, I], where expert e takes the inputs index i64[E, I]; EMPTY gives zeros."""
    return _split(editor, weight, index, axis=1, out_first=True)


def split_bias(editor: Editor, name: str, bias: fx.Node, index: torch.Tensor) -> fx.Node:
    """A bias [out] as [E, O]: under its own name if it is a parameter that one call reads, else under `name`."""
    picked = gather_groups(evaluate(editor.program, bias), index, 0)
    if bias.op == "get_attr" and len(bias.users) == 1:
        return editor.assign(str(bias.target), picked)
    return editor.parameter(editor.fresh(name), picked, like=bias, part=NodeRole.BIAS)


def gather_groups(tensor: torch.Tensor, index: torch.Tensor, axis: int, empty: float = 0) -> torch.Tensor:
    """tensor[..., n, ...], index i64[E, S] -> [E, S, ...]: slices along `axis`, filled with `empty` where index is EMPTY."""
    axis_first = tensor.movedim(axis, 0)
    index = index.to(tensor.device)
    picked = axis_first[index.clamp(min=0)]
    writable(picked)[index == EMPTY] = empty
    return picked.contiguous()


def _split(editor: Editor, node: fx.Node, index: torch.Tensor, axis: int, out_first: bool) -> fx.Node:
    """`axis` is that of the neurons in the layout of `node`: [out, in] if `out_first`, else [in, out]."""
    if node.op == "get_attr":
        picked = gather_groups(editor.program.tensor(str(node.target)), index, axis)
        by_outputs = (axis == 0) == out_first
        return editor.assign(str(node.target), picked if by_outputs else picked.transpose(1, 2).contiguous())
    if node.target is aten.t.default:
        (stored,) = node.args
        assert isinstance(stored, fx.Node)
        return _split(editor, stored, index, 1 - axis, not out_first)
    if node.target is ours.dequantize.default:
        return _split_codes(editor, node, index, axis, out_first)
    operands = [_split(editor, item, index, axis, out_first) for item in node.args]  # type: ignore[arg-type]
    return editor.call(aten.mul.Tensor, *operands, like=node)


def _split_codes(editor: Editor, node: fx.Node, index: torch.Tensor, axis: int, out_first: bool) -> fx.Node:
    codes, scale, scale_axis = node.args
    assert isinstance(codes, fx.Node)
    assert isinstance(scale, fx.Node)
    assert isinstance(scale_axis, int)
    scales = editor.program.tensor(str(scale.target))
    scales = (
        gather_groups(scales, index, 0, empty=1)
        if scale_axis == axis
        else scales.expand(len(index), -1).contiguous()
    )
    scale_per_output = (scale_axis == 0) == out_first
    new_codes = _split(editor, codes, index, axis, out_first)
    new_scale = editor.assign(str(scale.target), scales)
    return editor.call(ours.dequantize.default, new_codes, new_scale, 1 if scale_per_output else 2, like=node)
