"""Before translation: a feed-forward of chosen experts takes the form that is fastest on ONNX Runtime.

In floats that is products with each expert apart, on the rows that chose it; with very many experts, and in 8 bits, it is one
call of the kernel for mixtures, where the program rounds activations by blocks, as the kernel does, or not at all. It knows
ReLU, SiLU, GELU by its tanh form, and SiLU of a gate times up. Products of codes that it does not take, those of native
mixtures and those beside activations that are rounded as a whole, stand apart as those in floats do. Measured by
benchmarks/moe.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate, reads_no_input
from bmgraph.ir.editor import Editor
from bmgraph.ir.program import Program
from bmgraph.ops.experts import ZERO
from bmgraph.verify.weight_only_check import ROUNDINGS

aten = torch.ops.aten
ours = torch.ops.bmgraph

BLOCKS = (256, 128, 64, 32, 16)
"""By how many values of a row the kernel for products of codes scales them, best first."""

MOST_APART = 32
"""The most experts of a float feed-forward that are computed apart: each costs two calls, even where nobody chose it."""


@dataclass(frozen=True)
class _Found:
    """A feed-forward of experts: what it reads, its gate and up (or up alone) with their part of the rows that they take,
    its last product, the activation by the kernel's name, and by what blocks all that enters products is rounded (0:
    nothing is)."""

    x: fx.Node
    fronts: tuple[tuple[fx.Node, int | None], ...]
    down: fx.Node
    activation: str
    exact: bool
    block: int


def pack_experts(program: Program) -> int:
    """Rewrite every feed-forward of chosen experts that a kernel takes; returns their number."""
    count = 0
    with program.edit() as editor:
        for node in list(editor.graph.nodes):
            found = _find(node)
            if found is not None and _pack(editor, node, found):
                count += 1
    with program.edit() as editor:
        for node in list(editor.graph.nodes):
            coded = _codes(program, node) if _is_product(node) else None
            if coded is not None:
                editor.replace(node, _product_of_codes(editor, node, *coded))
    return count


def _product_of_codes(editor: Editor, product: fx.Node, codes: torch.Tensor, scale: torch.Tensor) -> fx.Node:
    """A product of 8-bit weights that no kernel for mixtures took."""
    x, weight, ids, *bias = product.args
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    if x.target in (ours.quantize_static.default, ours.quantize_dynamic.default):
        source, *step = x.args
        args = (source, *(step or (None, None)), *weight.args[:2], ids, *bias)
        return editor.call(ours.experts_linear_rounded.default, *args, like=product)
    features = codes.shape[2]
    source, block = _unrounded(x)
    size = block or next((size for size in BLOCKS if features % size == 0), BLOCKS[-1])
    blocks = -(-features // size)
    filled = torch.nn.functional.pad(_unsigned(codes), (0, blocks * size - features), value=ZERO)
    name = str(product.meta.get("site") or product.name)
    parts = {
        "blocks": filled.reshape(*codes.shape[:2], blocks, size),
        "scales": scale.repeat_interleave(blocks, 1),
    }
    readers = [
        editor.parameter(editor.fresh(f"{name}_{key}"), tensor.contiguous(), frozen=True)
        for key, tensor in parts.items()
    ]
    args = (source, *readers, ids, bias[0] if bias else None, features, bool(block))
    return editor.call(ours.experts_linear_blocks.default, *args, like=product)


def _find(last: fx.Node) -> _Found | None:
    """The feed-forward whose experts' outputs `last` sums up."""
    if last.target is not aten.sum.dim_IntList or len(last.args) != 2 or last.kwargs:
        return None
    down: Any = last.args[0]
    if not _is_product(down) or (len(down.args) > 3 and down.args[3] is not None):
        return None
    if list(last.args[1]) not in ([-2], [down.meta["val"].dim() - 2]):  # type: ignore[arg-type]
        return None
    inside, last_block = _unrounded(down.args[0])
    middle = _middle(inside)
    if middle is None:
        return None
    activation, exact, sources = middle
    fronts = tuple(_front(item) for item in sources)
    if any(front is None or front[0].args[2] is not down.args[2] for front in fronts):
        return None
    known = [front for front in fronts if front is not None]
    inputs = [_unrounded(front[0].args[0]) for front in known]
    x = inputs[0][0]
    blocks = {last_block, *(block for _, block in inputs)}
    if len(blocks) != 1 or None in blocks:  # the kernel rounds by blocks or not at all
        return None
    if any(item is not x for item, _ in inputs) or x.meta["val"].dim() not in (2, 3):
        return None
    if down.args[2].meta["val"].dim() != x.meta["val"].dim() or not _takes_all(known):
        return None
    return _Found(x, tuple(known), down, activation, exact, last_block or 0)


def _middle(node: fx.Node) -> tuple[str, bool, tuple[fx.Node, ...]] | None:
    """The activation by the kernel's name, whether the kernel computes it exactly, and what enters (gate and up, or up)."""
    if node.target is aten.mul.Tensor:
        for gate, up in (node.args, node.args[::-1]):
            if isinstance(gate, fx.Node) and isinstance(up, fx.Node) and gate.target is aten.silu.default:
                return "swiglu", True, (gate.args[0], up)  # type: ignore[return-value]
        return None
    if node.target is aten.gelu.default:
        return "gelu", node.kwargs.get("approximate", "none") == "tanh", (node.args[0],)  # type: ignore[return-value]
    known: dict[Any, str] = {aten.relu.default: "relu", aten.silu.default: "silu"}
    name = known.get(node.target)
    return (name, True, (node.args[0],)) if name else None  # type: ignore[return-value]


def _front(node: fx.Node) -> tuple[fx.Node, int | None] | None:
    """The product that gives a gate or an up, and which half of its rows that is; None for the half that is all."""
    if _is_product(node):
        return node, None
    cut: Any = node.args[0] if node.args else None
    if node.target is aten.slice.Tensor and _is_product(cut) and len(node.args) == 4:
        size, (axis, start, stop) = cut.meta["val"].shape[-1], node.args[1:]
        halves = {(0, size // 2): 0, (size // 2, size): 1}
        half = halves.get((start, min(stop, size)))  # type: ignore[arg-type, type-var]
        return (cut, half) if half is not None and axis in (-1, cut.meta["val"].dim() - 1) else None
    return None


def _takes_all(fronts: list[tuple[fx.Node, int | None]]) -> bool:
    """Whether gate and up are two products, or the first and the second half of one."""
    halves = [half for _, half in fronts]
    return halves in ([None], [None, None]) or (halves == [0, 1] and fronts[0][0] is fronts[1][0])


def _is_product(node: Any) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.target is ours.experts_linear.default
        and reads_no_input(node.args[1])  # type: ignore[arg-type]
    )


def _unrounded(node: Any) -> tuple[fx.Node, int | None]:
    """What a rounding rounds, and by what blocks: 0 where nothing is rounded, None where it is not by blocks."""
    if node.target is ours.quantize_blocks.default:
        return node.args[0], node.args[1]
    return node, None if node.target in ROUNDINGS else 0


def _pack(editor: Editor, last: fx.Node, found: _Found) -> bool:
    program = editor.program
    products = [node for node, _ in found.fronts]
    quantised = [_codes(program, node) for node in (*products, found.down)]
    name = str(found.down.meta.get("site") or last.name)
    biases = [_bias(program, node) for node in products]
    bias = None
    if any(item is not None for item in biases):
        bias = _joined([_or_zeros(item, node) for item, node in zip(biases, products)], found.fronts)
    if all(item is None for item in quantised):
        few = found.down.args[1].meta["val"].shape[0] <= MOST_APART  # type: ignore[union-attr]
        if found.block or few or not found.exact:
            return False
        first = _joined([evaluate(program, node.args[1]) for node in products], found.fronts)  # type: ignore[arg-type]
        second = evaluate(program, found.down.args[1])  # type: ignore[arg-type]
        tensors: dict[str, torch.Tensor | None] = {"first": first, "first_bias": bias, "second": second}
        _replace(
            editor, last, found, ours.mixture.default, (found.down.args[2],), name, tensors, found.activation
        )
        return True
    known = [item for item in quantised if item is not None]
    routing = _routing(found)
    if len(known) != len(quantised) or routing is None:
        return False
    *fronts, (second, second_scale) = known
    first = _joined([codes for codes, _ in fronts], found.fronts)
    scale = _joined([steps for _, steps in fronts], found.fronts)
    tensors = {
        "first": _unsigned(first), "first_scale": _repeated(scale, first.shape[2], found.block), "first_bias": bias,
        "second": _unsigned(second), "second_scale": _repeated(second_scale, second.shape[2], found.block),
    }  # fmt: skip
    _replace(
        editor, last, found, ours.mixture_int8.default, routing, name, tensors, found.activation, found.block
    )
    return True


def _routing(found: _Found) -> tuple[fx.Node, int] | None:
    """The scores of which a token takes the highest, and how many; None where experts are chosen in another way."""
    ids: Any = found.down.args[2]
    if ids.target is not getitem or ids.args[1] != 1 or ids.args[0].target is not aten.topk.default:
        return None
    scores, active, *options = ids.args[0].args
    experts, rank = found.down.args[1].meta["val"].shape[0], scores.meta["val"].dim()  # type: ignore[union-attr]
    highest = options[:1] in ([], [-1], [rank - 1]) and options[1:2] in ([], [True])
    return (scores, active) if highest and scores.meta["val"].shape[-1] == experts else None


def _replace(
    editor: Editor, last: fx.Node, found: _Found, call: Callable[..., Any], routing: tuple[Any, ...], name: str,
    tensors: dict[str, torch.Tensor | None], *options: object,
) -> None:  # fmt: skip
    readers = [
        None
        if tensor is None
        else editor.parameter(editor.fresh(f"{name}_{key}"), tensor.contiguous(), frozen=True)
        for key, tensor in tensors.items()
    ]
    made = editor.call(call, found.x, *routing, *readers, *options, like=found.down, before=last)
    editor.replace(last, made)


def _codes(program: Program, product: fx.Node) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Codes i8[E, O, I] and scales f[E, O] of a weight; None where it is not of 8 bits."""
    weight: Any = product.args[1]
    if weight.target is not ours.dequantize.default or weight.args[2] != 1:
        return None
    codes, scale = (evaluate(program, item) for item in weight.args[:2])
    return (codes, scale) if scale.dim() == 2 else None


def _bias(program: Program, product: fx.Node) -> torch.Tensor | None:
    bias = product.args[3] if len(product.args) > 3 else None
    return evaluate(program, bias) if isinstance(bias, fx.Node) else None


def _or_zeros(bias: torch.Tensor | None, product: fx.Node) -> torch.Tensor:
    if bias is not None:
        return bias
    weight: Any = product.args[1]
    value = weight.meta["val"]
    return torch.zeros(value.shape[:2], dtype=value.dtype)


def _joined(parts: list[torch.Tensor], fronts: tuple[tuple[fx.Node, int | None], ...]) -> torch.Tensor:
    """Rows of up as they are; of a gate and up, in turns."""
    if len(fronts) == 1:
        return parts[0]
    gate, up = parts if fronts[0][1] is None else parts[0].chunk(2, 1)
    return torch.stack([gate, up], 2).flatten(1, 2)


def _unsigned(codes: torch.Tensor) -> torch.Tensor:
    return (codes.to(torch.int16) + ZERO).to(torch.uint8)


def _repeated(scale: torch.Tensor, size: int, block: int) -> torch.Tensor:
    """A scale for every block of `size` inputs, all the same."""
    return scale.unsqueeze(2).expand(-1, -1, size // block) if block else scale
