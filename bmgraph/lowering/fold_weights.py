"""Compute weights that are expressions once, before lowering: engines do not train them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate, reads_no_input
from bmgraph.analysis.weight_sites import products
from bmgraph.ir.evaluation import upstream
from bmgraph.ir.node_role import is_delta, role_of
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of

aten = torch.ops.aten


def fold_weights(program: Program) -> None:
    """Replace each weight or bias of a product that is computed from parameters by its value, in place.

    Ranges of a parameter, weight norm and parametrizations become plain weights, so that no engine needs their operators.
    Quantised weights, whose integers the engine multiplies, and plain casts stay. Only for programs in eval form.
    """
    folded: dict[fx.Node, fx.Node] = {}
    with program.edit() as editor:
        for product in products(editor.graph):
            for operand in product.args[1:3]:
                stored: Any = operand
                if isinstance(stored, fx.Node) and stored.target is aten.t.default:
                    stored = stored.args[0]
                if not isinstance(stored, fx.Node) or stored in folded or not _is_computed(stored):
                    continue
                name = editor.fresh(str(stored.meta.get("site", stored.name)))
                node = editor.parameter(
                    name, evaluate(program, stored).contiguous(), like=stored, frozen=True
                )
                stored.replace_all_uses_with(node)
                folded[stored] = folded[node] = node


def fold_networks(program: Program) -> None:
    """Replace what networks of deltas make of parameters alone, such as the keys of a prefix, by its value, in place.

    Only for programs in eval form.
    """
    constant: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function" and constant.issuperset(node.all_input_nodes)
        ):
            constant.add(node)
    with program.edit() as editor:
        for node in list(editor.graph.nodes):
            if node not in constant or node.op != "call_function" or not is_delta(node):
                continue
            ends = any(user not in constant for user in node.users)
            if ends and any(traits_of(item).kind is Kind.LINEAR for item in upstream(node)):
                name = editor.fresh(f"{node.meta.get('site', node.name)}_made")
                value = evaluate(program, node).contiguous()
                made = editor.parameter(name, value, like=node, frozen=True, part=role_of(node))
                node.replace_all_uses_with(made)


def _is_computed(node: fx.Node) -> bool:
    """Whether a node is an expression of tensors of the program alone, of standard operators, and more than a cast."""
    if node.op != "call_function" or not reads_no_input(node):
        return False
    calls = {item.target for item in upstream(node) if item.op == "call_function"}
    standard = all(not isinstance(call, torch._ops.OpOverload) or call.namespace == "aten" for call in calls)
    return standard and not calls <= {aten.to.dtype}
