"""The weight of a linear, or of the same linear of several experts, whatever expression stands in front of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import bmgraph.ops  # noqa: F401  (registers experts_linear)
from bmgraph.analysis.interpreter import of_parameters_alone
from bmgraph.ir.node_role import is_delta
from bmgraph.ir.program import Program

aten = torch.ops.aten

PRODUCTS = frozenset({aten.linear.default, torch.ops.bmgraph.experts_linear.default})
"""Calls (x, weight, ...) that multiply with a weight [out, in], or with one of several [experts, out, in]."""


@dataclass(frozen=True)
class Weight:
    """The matrix of one linear: `site` is the name of its parameter, `node` what holds the matrix as it is stored
    (an expression or the parameter itself), `transposed` whether it is stored [in, out]. Experts' are [experts, out, in]."""

    site: str
    node: fx.Node
    transposed: bool

    @property
    def channel_axis(self) -> int:
        """The dimension of the stored matrix that runs over the outputs."""
        experts = self.node.meta["val"].dim() == 3
        return 1 if self.transposed or experts else 0


def weight_of(program: Program, linear: fx.Node) -> Weight | None:
    """The weight of a product, None where it is computed from an input."""
    node: Any = linear.args[1]
    transposed = node.target is aten.t.default
    if transposed:
        node = node.args[0]
    if not of_parameters_alone(node):
        return None
    if node.op == "get_attr":
        return Weight(str(node.target), node, transposed)
    site = node.meta.get("site")
    return Weight(str(site), node, transposed) if site else None


def linears(graph: fx.Graph) -> list[fx.Node]:
    """Every product with a weight that all tokens share, in order; those of deltas are no sites."""
    return [node for node in graph.nodes if node.target is aten.linear.default and not is_delta(node)]


def products(graph: fx.Graph) -> list[fx.Node]:
    """Every product with a weight, shared or of experts, in order; those of deltas are no sites."""
    return [node for node in graph.nodes if node.target in PRODUCTS and not is_delta(node)]


def read_elsewhere(weight: Weight) -> bool:
    """Whether something that is no product reads a weight too, as the embedding of a tied head does."""
    readers = [user for user in weight.node.users if user.target is not aten.t.default]
    return any(user.target not in PRODUCTS for user in readers)


def site_path(site: str) -> str:
    """The module path of a site: the name of its parameter without `.weight`."""
    return site.removesuffix(".weight")
