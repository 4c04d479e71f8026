"""What `Merge` needs for weights in integer codes: they become floating-point weights, and the merged ones codes again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.site_filter import matches
from bmgraph.analysis.weight_sites import Weight, linears, weight_of
from bmgraph.ir.node_role import changes_input
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import calls, traits_of
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.passes.quantize import Quantize
from bmgraph.verify.metrics import relative_error


@dataclass(frozen=True, repr=False)
class PlainWeights(ModelPass):
    """Store the weights of `sites`, which are codes, as the floating-point numbers that the codes stand for; a part of `Merge`."""

    effect: ClassVar[Effect] = "exact"

    sites: tuple[str, ...] = ()

    def run(self, program: Program, context: Context) -> Program:
        """Replace each chosen weight by a parameter of the site's name."""
        for graph in program.graphs:
            with program.edit(graph, by=str(self)) as editor:
                for linear in linears(editor.graph):
                    weight = weight_of(program, linear)
                    if weight is None or not in_codes(weight) or not matches(weight.site, self.sites):
                        continue
                    if weight.site not in program.parameters:
                        value = evaluate(program, weight.node)
                        editor.parameter(weight.site, value, frozen=True)
                        context.edited(weight.site, "as floating-point numbers")
                    weight.node.replace_all_uses_with(editor.read(weight.site))
        return program


def in_codes(weight: Weight) -> bool:
    """Whether a weight is integer codes times scales."""
    return calls(weight.node, torch.ops.bmgraph.dequantize)


def reads_rounded(linear: fx.Node) -> bool:
    """Whether the input of a linear is rounded."""
    x = linear.args[0]
    while isinstance(x, fx.Node) and changes_input(x):
        x = x.args[0]
    return isinstance(x, fx.Node) and traits_of(x).kind is Kind.ROUNDING


def rounding_again(sites: Sequence[str]) -> Quantize:
    """The pass that makes codes of the weights of these sites, whatever their size; activations stay as they are."""
    return Quantize(
        "int8", activations="none", include=tuple(sites), outliers=False, smallest=1, site_drift=math.inf
    )


def rounding_error(program: Program, linear: fx.Node, merged: torch.Tensor) -> float:
    """How far the merged weight of a linear moves (relative L2) where it is rounded to int8 codes."""
    weight = weight_of(program, linear)
    assert weight is not None
    axis = weight.channel_axis
    codes, scale = rounding_again(("*",)).codes(merged, axis)
    return relative_error(torch.ops.bmgraph.dequantize(codes, scale, axis), merged)


def sites_in_codes(program: Program, graph: fx.Graph) -> list[str]:
    """The sites whose weight is in codes, once for each linear of a graph."""
    found = (weight_of(program, linear) for linear in linears(graph))
    return [weight.site for weight in found if weight is not None and in_codes(weight)]
