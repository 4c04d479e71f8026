"""How far the outputs of products move when their inputs and weights are replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.weight_sites import Weight
from bmgraph.ir.eval_form import in_eval
from bmgraph.ir.program import Program
from bmgraph.verify.metrics import relative_error

Replace = Callable[[fx.Node, Weight, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(product, its weight, its input x, the weight's value as stored) -> what stands in place of x and of the value."""


class SiteOutputErrors:
    """Measures the outputs of products on the values that `visit` is shown: give it to `Observed.run` with `names`.

    `errors` holds, by site, the largest relative error (L2) of x' @ w' from x @ w over all batches and all products with
    that weight. Every expert is measured on the whole input of its product, routed or not.
    """

    def __init__(self, program: Program, sites: Iterable[tuple[fx.Node, Weight]], replace: Replace) -> None:
        self.errors: dict[str, float] = {}
        self._program = program
        self._replace = replace
        self._readers: dict[str, list[tuple[fx.Node, Weight]]] = {}
        for product, weight in sites:
            self._readers.setdefault(entering(product).name, []).append((product, weight))

    @property
    def names(self) -> set[str]:
        """The names of the nodes that enter the products."""
        return set(self._readers)

    def visit(self, name: str, x: torch.Tensor) -> None:
        """Measure all products that the value x of a node enters."""
        for product, weight in self._readers[name]:
            value = evaluate(self._program, weight.node)
            moved_x, moved = self._replace(product, weight, x, value)
            error = relative_error(moved_x @ _factor(moved, weight), x @ _factor(value, weight))
            self.errors[weight.site] = max(self.errors.get(weight.site, 0.0), error)


def entering(product: fx.Node) -> fx.Node:
    """The node that enters a product in eval form."""
    node = product.args[0]
    assert isinstance(node, fx.Node)
    return in_eval(node)


def _factor(value: torch.Tensor, weight: Weight) -> torch.Tensor:
    """A weight [out, in], [in, out] or [experts, out, in] as f[in, n]."""
    return value if weight.transposed else value.flatten(0, -2).T
