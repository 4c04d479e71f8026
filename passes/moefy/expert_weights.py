"""A weight cut into one matrix for each expert: its entries are moved, never rounded again."""

from __future__ import annotations

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.ir.editor import Editor
from bmgraph.passes.moefy.balanced_kmeans import EMPTY

aten = torch.ops.aten
ours = torch.ops.bmgraph

READ = frozenset({aten.t.default, aten.mul.Tensor, ours.dequantize.default})
"""The calls that a weight may be made of."""


def is_splittable(weight: fx.Node, users: set[fx.Node]) -> bool:
    """Whether a weight [out, in] is made of parameters in a way that can be cut, and nothing but `users` reads it."""
    if not set(weight.users) <= users:
        return False
    if weight.op == "get_attr":
        return True
    if weight.target is ours.dequantize.default:
        codes, scale = weight.args[:2]
        assert isinstance(codes, fx.Node)
        assert isinstance(scale, fx.Node)
        return all(item.op == "get_attr" and set(item.users) == {weight} for item in (codes, scale))
    return weight.target in READ and all(
        isinstance(item, fx.Node) and is_splittable(item, {weight}) for item in weight.args
    )


def split_outputs(editor: Editor, weight: fx.Node, index: torch.Tensor) -> fx.Node:
    """A weight [out, in] as [E, O, in], where expert e takes the outputs index i64[E, O]; EMPTY gives zeros."""
    return _split(editor, weight, index, axis=0, stored_as_is=True)


def split_inputs(editor: Editor, weight: fx.Node, index: torch.Tensor) -> fx.Node:
    """A weight [out, in] as [E, out, I], where expert e takes the inputs index i64[E, I]; EMPTY gives zeros."""
    return _split(editor, weight, index, axis=1, stored_as_is=True)


def split_bias(editor: Editor, name: str, bias: fx.Node, index: torch.Tensor) -> fx.Node:
    """A bias [out] as [E, O]: under its own name where it is a parameter that one call reads, else under `name`."""
    picked = pick(evaluate(editor.program, bias), index, 0)
    if bias.op == "get_attr" and len(bias.users) == 1:
        return editor.assign(str(bias.target), picked)
    return editor.parameter(editor.fresh(name), picked, like=bias, part="bias")


def pick(tensor: torch.Tensor, index: torch.Tensor, axis: int, empty: float = 0) -> torch.Tensor:
    """tensor[..., n, ...], index i64[E, S] -> [E, S, ...] of the slices of `axis`; `empty` fills what EMPTY stands for."""
    moved = tensor.movedim(axis, 0)
    index = index.to(tensor.device)
    picked = moved[index.clamp(min=0)]
    picked[index == EMPTY] = empty
    return picked.contiguous()


def _split(editor: Editor, node: fx.Node, index: torch.Tensor, axis: int, stored_as_is: bool) -> fx.Node:
    """`axis` is the one of the neurons in the layout of `node`, which is [out, in] if `stored_as_is`, else [in, out]."""
    if node.op == "get_attr":
        picked = pick(editor.program.tensor(str(node.target)), index, axis)
        outputs = (axis == 0) == stored_as_is
        return editor.assign(str(node.target), picked if outputs else picked.transpose(1, 2).contiguous())
    if node.target is aten.t.default:
        (inner,) = node.args
        assert isinstance(inner, fx.Node)
        return _split(editor, inner, index, 1 - axis, not stored_as_is)
    if node.target is ours.dequantize.default:
        return _split_codes(editor, node, index, axis, stored_as_is)
    parts = [_split(editor, item, index, axis, stored_as_is) for item in node.args]  # type: ignore[arg-type]
    return editor.call(aten.mul.Tensor, *parts, like=node)


def _split_codes(
    editor: Editor, node: fx.Node, index: torch.Tensor, axis: int, stored_as_is: bool
) -> fx.Node:
    codes, scale, scaled = node.args
    assert isinstance(codes, fx.Node)
    assert isinstance(scale, fx.Node)
    assert isinstance(scaled, int)
    steps = editor.program.tensor(str(scale.target))
    steps = pick(steps, index, 0, empty=1) if scaled == axis else steps.expand(len(index), -1).contiguous()
    of_outputs = (scaled == 0) == stored_as_is
    new_codes = _split(editor, codes, index, axis, stored_as_is)
    new_scale = editor.assign(str(scale.target), steps)
    return editor.call(ours.dequantize.default, new_codes, new_scale, 1 if of_outputs else 2, like=node)
