"""Compute all experts and mask those that were not chosen, where one product per expert would take longer than it saves.

Every product per expert is a call, whether a token chose the expert or not. With many small experts, or most of them active, calls
take longer than the multiplications that they leave out. Then the experts are one feed-forward again, whose neurons are
multiplied by 0 or by the weight of their expert: the same function, in the time of the dense form.

Shapes: T any leading sizes, K experts chosen per token, E experts, I inputs, O outputs, S neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from bmgraph.ir.editor import Editor
from bmgraph.ir.program import Program
from bmgraph.ops.block_codes import block_size, pack_zeros, unpack_zeros
from bmgraph.ops.traits import is_elementwise

aten = torch.ops.aten
ours = torch.ops.bmgraph

CALL, ROW = 0.8, 1.5
"""Microseconds that a product per expert takes beside its multiplications, and a token with each expert that it chose."""

WEIGHTS = 14.0
"""Microseconds in which a dense product reads a million weights in codes for one token."""


class _Product(NamedTuple):
    """The arguments of `bmgraph::experts_linear_blocks`."""

    x: fx.Node
    codes: fx.Node
    scale: fx.Node
    ids: fx.Node
    bias: fx.Node | None
    bits: int
    features: int
    rounded: bool
    zero: fx.Node | None = None

    @property
    def experts(self) -> int:
        """E."""
        return int(self.codes.meta["val"].shape[0])

    @property
    def active(self) -> int:
        """K."""
        return int(self.ids.meta["val"].shape[-1])

    @property
    def weights(self) -> int:
        """The number of weights of all experts."""
        return self.experts * int(self.codes.meta["val"].shape[1]) * self.features


def _product(node: fx.Node) -> _Product:
    given: Any = node.args
    return _Product(*given)


@dataclass(frozen=True)
class _Products:
    """The expert products of a feed-forward: its last one, those before, with the ranges of outputs that are read (None: all),
    the calls between in order, and the weights f[T, K, 1] of outputs (None: all 1)."""

    down: fx.Node
    first: dict[fx.Node, tuple[fx.Node, tuple[int, int] | None]]
    between: list[fx.Node]
    weights: fx.Node | None


def mask_experts(program: Program) -> list[str]:
    """Rewrite feed-forwards of experts in codes of blocks that lose by one product per expert, in place; returns what a
    report says of them."""
    notes: dict[str, int] = {}
    with program.edit() as editor:
        for node in list(editor.graph.nodes):
            found = _match(node)
            if found is None or _pays(found):
                continue
            down = _product(found.down)
            editor.replace(node, _masked(editor, found, node))
            said = f"{down.active} of {down.experts} experts"
            notes[said] = notes.get(said, 0) + 1
    return [
        f"experts: {count} feed-forwards with {said} are computed whole and masked, since a product per expert would take longer: "
        "nothing is saved there, larger or fewer experts would"
        for said, count in notes.items()
    ]


def _pays(found: _Products) -> bool:
    """Whether one product per expert is faster for one token than all experts together."""
    nodes = [node for node, _ in found.first.values()]
    products = [_product(node) for node in dict.fromkeys((*nodes, found.down))]
    down = products[-1]
    saved = (1 - down.active / down.experts) * WEIGHTS * sum(item.weights for item in products) / 1e6
    return saved > len(products) * (CALL * down.experts + ROW * down.active)


def _match(last: fx.Node) -> _Products | None:
    """The feed-forward whose expert outputs `last` sums, perhaps weighted; None if it cannot be masked."""
    if last.target is not aten.sum.dim_IntList or len(last.args) != 2 or last.kwargs:
        return None
    node: Any = last.args[0]
    axes: Any = last.args[1]
    weights: Any = None
    if node.target is aten.mul.Tensor:
        node, weights = node.args
    down = _product_of(node)
    if down is None or down.bias is not None or list(axes) not in ([-2], [down.ids.meta["val"].dim() - 1]):
        return None
    if weights is not None and not _is_weight(weights, node):
        return None
    if down.features % block_size(down.codes.meta["val"], down.bits):
        return None  # a block would lie in two experts
    found = _Products(node, {}, [], weights)
    return found if _walk(found, down.x, down.ids) and found.first else None


def _product_of(node: Any) -> _Product | None:
    """The arguments of an expert product in codes of blocks that are parameters; None for another node."""
    if not isinstance(node, fx.Node) or node.target is not ours.experts_linear_blocks.default:
        return None
    product = _product(node)
    stored = (product.codes, product.scale, product.bias, product.zero)
    return product if all(item is None or item.op == "get_attr" for item in stored) else None


def _is_weight(factor: Any, outputs: fx.Node) -> bool:
    """Whether a factor is one number for each chosen expert, f[T, K, 1]."""
    if not isinstance(factor, fx.Node):
        return False
    value = factor.meta["val"]
    return bool(value.dim() == outputs.meta["val"].dim() and value.shape[-1] == 1)


def _walk(found: _Products, node: fx.Node, ids: fx.Node) -> bool:
    """Add what a value is computed of, back to products of the same choice that share their input; False if there is more."""
    if node in found.first or node in found.between:
        return True
    source, span = _sliced(node)
    product = _product_of(source)
    if product is not None:
        if product.ids is not ids or product.x.meta["val"].dim() != ids.meta["val"].dim():
            return False
        found.first[node] = (source, span)
        return True
    if not is_elementwise(node) or not all(_walk(found, item, ids) for item in node.all_input_nodes):
        return False
    found.between.append(node)
    return True


def _sliced(node: fx.Node) -> tuple[fx.Node, tuple[int, int] | None]:
    """The value that a node takes a range of the last axis of, and the range; else the node itself."""
    if node.target is not aten.slice.Tensor or len(node.args) != 4:
        return node, None
    given: Any = node.args
    source, axis, start, stop = given
    shape = source.meta["val"].shape
    last = axis in (-1, len(shape) - 1)
    return (source, (start, min(stop, shape[-1]))) if last else (node, None)


def _masked(editor: Editor, found: _Products, last: fx.Node) -> fx.Node:
    """The same feed-forward over the neurons of all experts, side by side: [T, E * S]."""
    down = _product(found.down)
    values: dict[fx.Node, fx.Node] = {}
    for node, (source, span) in found.first.items():
        values[node] = _side_by_side(editor, source, span, last)
    for node in found.between:
        assert callable(node.target)
        arguments: Any = fx.map_arg((node.args, node.kwargs), lambda old: values.get(old, old))
        values[node] = editor.call(node.target, *arguments[0], like=node, before=last, **arguments[1])
    hidden = values[down.x]
    site = str(found.down.meta.get("site", found.down.name))

    def call(target: Any, *arguments: Any) -> fx.Node:
        return editor.call(target, *arguments, like=found.down, before=last)

    def constant(name: str, tensor: torch.Tensor) -> fx.Node:
        return editor.parameter(editor.fresh(f"{site}_{name}"), tensor, frozen=True)

    numbers = torch.arange(down.experts)
    chosen = call(aten.eq.Tensor, call(aten.unsqueeze.default, down.ids, -1), constant("numbers", numbers))
    shares = call(aten.to.dtype, chosen, hidden.meta["val"].dtype)
    if found.weights is not None:
        shares = call(aten.mul.Tensor, shares, found.weights)
    by_expert = call(aten.sum.dim_IntList, shares, [-2])
    each = call(aten.unflatten.int, hidden, -1, [down.experts, down.features])
    chosen_alone = call(aten.mul.Tensor, each, call(aten.unsqueeze.default, by_expert, -1))
    return _summed(editor, found.down, call(aten.flatten.using_ints, chosen_alone, -2, -1), last)


def _side_by_side(editor: Editor, node: fx.Node, span: tuple[int, int] | None, last: fx.Node) -> fx.Node:
    """One product for the outputs of all experts, or a range of them: [T, E * O]."""
    product, rows = _product(node), slice(*(span or (None, None)))

    def flat(reader: fx.Node | None) -> torch.Tensor | None:
        return None if reader is None else editor.program.tensor(str(reader.target))[:, rows].flatten(0, 1)

    tensors = [flat(item) for item in (product.codes, product.scale, product.bias, product.zero)]
    return _linear(editor, node, product.x, tensors, product.features, last)


def _summed(editor: Editor, node: fx.Node, hidden: fx.Node, last: fx.Node) -> fx.Node:
    """The last product over the neurons of all experts, which sums their outputs."""
    product, program = _product(node), editor.program
    codes, scale = (
        program.tensor(str(item.target)).transpose(0, 1) for item in (product.codes, product.scale)
    )
    zero = None
    if product.zero is not None:
        points = unpack_zeros(program.tensor(str(product.zero.target)), product.bits, scale.shape[-1])
        zero = pack_zeros(points.transpose(0, 1).flatten(1), product.bits)
    tensors = [codes.flatten(1, 2), scale.flatten(1), None, zero]
    return _linear(editor, node, hidden, tensors, product.experts * product.features, last)


def _linear(
    editor: Editor, node: fx.Node, x: fx.Node, tensors: Sequence[torch.Tensor | None], features: int, last: fx.Node
) -> fx.Node:  # fmt: skip
    """A product like that of a node with packed codes, scales, bias and zero points."""
    product, site = _product(node), str(node.meta.get("site", node.name))
    names = ("codes", "scale", "bias", "zero")
    codes, scale, bias, zero = (
        None if item is None else editor.parameter(editor.fresh(f"{site}_all_{name}"), item.contiguous(), frozen=True)
        for name, item in zip(names, tensors)
    )  # fmt: skip
    points = () if zero is None else (zero,)
    arguments = (x, codes, scale, bias, product.bits, features, product.rounded, *points)
    return editor.call(ours.linear_blocks.default, *arguments, like=node, before=last)
