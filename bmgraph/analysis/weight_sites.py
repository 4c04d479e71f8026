"""Finds the weight matrix of each linear, plain or of experts, behind any expression around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate, reads_no_input
from bmgraph.analysis.structure.linears import tensors_of, weight_name
from bmgraph.analysis.structure.value_origins import stem
from bmgraph.ir.node_role import NodeRole, has_role, is_delta
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of

aten = torch.ops.aten

PRODUCTS = frozenset({Kind.LINEAR, Kind.EXPERTS})
"""Calls (x, weight, ...) that multiply by a weight [out, in], or by one of a stack [experts, out, in]."""


@dataclass(frozen=True)
class Weight:
    """The weight matrix of one linear, or the stacked matrices [experts, out, in] of experts.

    `site`: name of its parameter. `node`: the node that gives the matrix as stored, an expression or the parameter
    itself. `transposed`: stored as [in, out].
    """

    site: str
    node: fx.Node
    transposed: bool

    @property
    def channel_axis(self) -> int:
        """Axis of the stored matrix that indexes the outputs."""
        experts = self.node.meta["val"].dim() == 3
        return 1 if self.transposed or experts else 0


def weight_of(program: Program, linear: fx.Node) -> Weight | None:
    """The weight of a linear; None if it is computed from an input, or is an expression that belongs to no site."""
    node: Any = linear.args[1]
    transposed = node.target is aten.t.default
    if transposed:
        node = node.args[0]
    if not reads_no_input(node):
        return None
    if node.op == "get_attr":
        return Weight(str(node.target), node, transposed)
    site = node.meta.get("site")
    return Weight(str(site), node, transposed) if site else None


def unnamed_weights(program: Program) -> dict[str, str]:
    """Weights of products of the main graph that are no sites, by their largest tensor -> why passes that change weights
    leave them alone: expressions that differ between training and evaluation, and factors of other products."""
    found: dict[str, str] = {}
    for node in products(program.graph):
        operand: Any = node.args[1]
        if weight_of(program, node) is None and reads_no_input(operand):
            found[weight_name(program, operand)] = (
                f"its weight is computed by {stem(operand)} in another way in training than in evaluation"
            )
    return found | other_products(program)


OTHER_PRODUCTS = frozenset({Kind.BATCHED_PRODUCT, Kind.PRODUCT})
"""Products that are not brought to the form of a linear."""


def other_products(program: Program) -> dict[str, str]:
    """Parameters of the main graph that are multiplied otherwise than as the weight of a linear, by the largest tensor of
    their expression -> why passes that change weights leave them alone."""
    found: dict[str, str] = {}
    for node in program.graph.nodes:
        if traits_of(node).kind not in OTHER_PRODUCTS or is_delta(node):
            continue
        factors: Any = node.args[1] if node.target is aten.einsum.default else node.args[-2:]
        for operand in factors:
            if not reads_no_input(operand):
                continue
            name = weight_name(program, operand) if tensors_of(operand) else ""
            if name in program.parameters:
                found[name] = f"it is multiplied by {stem(node)}, not as the weight of a linear"
    return {name: reason for name, reason in found.items() if name not in set(product_sites(program))}


def linears(graph: fx.Graph) -> list[fx.Node]:
    """All linears of a graph in order, without those of deltas and experts."""
    return [node for node in graph.nodes if node.target is aten.linear.default and not is_delta(node)]


def products(graph: fx.Graph) -> list[fx.Node]:
    """All linears of a graph in order, those of experts too, without those of deltas."""
    return [node for node in graph.nodes if traits_of(node).kind in PRODUCTS and not is_delta(node)]


def product_sites(program: Program) -> list[str]:
    """The sites of all products of the main graph, once for each use."""
    found = (weight_of(program, node) for node in products(program.graph))
    return [weight.site for weight in found if weight is not None]


def read_elsewhere(weight: Weight) -> bool:
    """Whether another operator than a linear also reads the weight, such as the embedding of a tied head."""
    readers = [user for user in weight.node.users if user.target is not aten.t.default]
    return any(traits_of(user).kind not in PRODUCTS for user in readers)


def site_value(program: Program, site: str) -> torch.Tensor:
    """The current weight matrix of a site, behind any expression that passes put around it."""
    outermost = None
    for node in program.graph.nodes:
        if node.meta.get("site") == site and has_role(node, NodeRole.WEIGHT):
            outermost = node
    return evaluate(program, outermost) if outermost is not None else program.tensor(site)


def site_path(site: str) -> str:
    """Module path of a site: the name of its parameter without `.weight`."""
    return site.removesuffix(".weight")
