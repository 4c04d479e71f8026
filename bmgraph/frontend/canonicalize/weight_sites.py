"""Name every weight that is an expression, so that passes find it as a site: a range of a parameter, or a computed weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bmgraph.analysis.interpreter import reads_no_input
from bmgraph.analysis.structure.linears import tensors_of
from bmgraph.analysis.weight_ranges import Region, region_of
from bmgraph.analysis.weight_sites import products
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import KEY, NodeRole
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of

aten = torch.ops.aten


def name_weights(editor: Editor) -> None:
    """Write each weight or bias that is a part of a parameter as slices of it, and give weight expressions a site.

    nn.MultiheadAttention keeps three weights in `in_proj_weight`; each is a site of its own then,
    `in_proj_weight[0:32]`. A weight that is computed (weight norm, a parametrization) is a site under the name of its
    largest tensor. One that differs between training and evaluation, by dropout, gets no site: no single value could stand
    for it.
    """
    made: dict[Region, fx.Node] = {}
    for node in products(editor.graph):
        for position, operand in enumerate(node.args):
            if position and isinstance(operand, fx.Node):
                _write_region(editor, node, operand, made)
    taken = {str(node.target) for node in editor.graph.nodes if node.op == "get_attr"}
    for node in products(editor.graph):
        weight = _stored(node)
        if (
            weight.op == "get_attr"
            or "site" in weight.meta
            or not reads_no_input(weight)
            or _is_random(weight)
        ):
            continue
        site = _largest(editor.program, weight)
        if any(
            _stored(other).op == "get_attr" and _stored(other).target == site
            for other in products(editor.graph)
        ):
            site = _free(site, taken)
        while any(item.meta.get("site") == site for item in editor.graph.nodes):
            site = _free(site, taken)
        weight.meta.update({"site": site, KEY: NodeRole.WEIGHT})


def _stored(product: fx.Node) -> fx.Node:
    """The weight of a product as it is stored, without `t`."""
    weight: Any = product.args[1]
    return weight.args[0] if weight.target is aten.t.default else weight  # type: ignore[no-any-return]


def _free(name: str, taken: set[str]) -> str:
    """`name_2`, `name_3`, ...: the first that is not taken; it is taken then."""
    count = 2
    while f"{name}_{count}" in taken:
        count += 1
    taken.add(f"{name}_{count}")
    return f"{name}_{count}"


def _largest(program: Program, weight: fx.Node) -> str:
    """The largest tensor that an expression reads, the nearest of several."""
    return max(tensors_of(weight), key=lambda name: program.tensor(name).numel())


def _is_random(weight: fx.Node) -> bool:
    """Whether an expression has another value in training than in evaluation."""
    seen: set[fx.Node] = set()
    stack = [weight]
    while stack:
        item = stack.pop()
        if traits_of(item).kind is Kind.DROPOUT or traits_of(item).writes:
            return True
        if item not in seen:
            seen.add(item)
            stack.extend(item.all_input_nodes)
    return False


def _write_region(editor: Editor, product: fx.Node, operand: fx.Node, made: dict[Region, fx.Node]) -> None:
    """Replace an operand that takes a part of a parameter by slices of it, one node for all products that read it."""
    transposed = operand.target is aten.t.default
    part: Any = operand.args[0] if transposed else operand
    found = region_of(editor.program, part)
    if found is None:
        return
    source, region = found
    if region not in made:
        made[region] = _slices(editor, source, region, before=min(source.users))
        if product.args[1] is operand:
            made[region].meta["site"] = region.name(editor.program.tensor(region.tensor).shape)
            made[region].meta[KEY] = NodeRole.WEIGHT
    node = made[region]
    new = editor.call(aten.t.default, node, like=product) if transposed else node
    product.replace_input_with(operand, new)


def _slices(editor: Editor, source: fx.Node, region: Region, before: fx.Node) -> fx.Node:
    """The calls that take a region of a tensor."""
    node, shape = source, editor.program.tensor(region.tensor).shape
    for axis, (taken, size) in reversed(list(enumerate(zip(region.axes, shape)))):
        if isinstance(taken, int):
            node = editor.call(aten.select.int, node, axis, taken, like=before)
        elif taken != (0, size):
            node = editor.call(aten.slice.Tensor, node, axis, *taken, like=before)
    return node
