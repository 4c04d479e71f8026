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
from bmgraph.ops.block_codes import block_arguments, block_size
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import calls, traits_of
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.passes.quantize.quantize import Quantize
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


@dataclass(frozen=True)
class CodeForm:
    """The scheme of a weight's codes, the number of inputs that share a scale, where the scheme has groups, and whether they have no
    zero points."""

    scheme: str
    group: int | None = None
    symmetric: bool = True

    def rounding(self, sites: Sequence[str]) -> Quantize:
        """The pass that makes such codes of the weights of these sites, whatever their size; activations stay as they are."""
        return Quantize(
            self.scheme, activations="none", include=tuple(sites), outliers=False, smallest=1, site_drift=math.inf,
            group=self.group, symmetric=self.symmetric,
        )  # fmt: skip

    def error(self, program: Program, linear: fx.Node, merged: torch.Tensor) -> float:
        """How far the merged weight of a linear moves (relative L2) where it is rounded to such codes."""
        weight = weight_of(program, linear)
        assert weight is not None
        return relative_error(self.rounding(("*",)).rounded(merged, weight.channel_axis), merged)


def form_of(node: fx.Node) -> CodeForm | None:
    """The form of a weight's codes, given the node that stands for it; None where it is not codes times scales."""
    if calls(node, torch.ops.bmgraph.dequantize):
        codes = node.args[0]
        assert isinstance(codes, fx.Node)
        return CodeForm("fp8" if codes.meta["val"].dtype.is_floating_point else "int8")
    if calls(node, torch.ops.aten.t) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if not calls(node, torch.ops.bmgraph.dequantize_blocks):
        return None
    given = block_arguments(node)
    block = block_size(given.codes.meta["val"], given.bits)
    return CodeForm(f"int{given.bits}", block, given.zero is None)


def in_codes(weight: Weight) -> bool:
    """Whether a weight is integer codes times scales."""
    return form_of(weight.node) is not None


def reads_rounded(linear: fx.Node) -> bool:
    """Whether the input of a linear is rounded."""
    x = linear.args[0]
    while isinstance(x, fx.Node) and changes_input(x):
        x = x.args[0]
    return isinstance(x, fx.Node) and traits_of(x).kind is Kind.ROUNDING


def sites_in_codes(program: Program, graph: fx.Graph) -> list[tuple[str, CodeForm]]:
    """The sites whose weight is in codes, with their form, once for each linear of a graph."""
    found = (weight_of(program, linear) for linear in linears(graph))
    forms = ((weight.site, form_of(weight.node)) for weight in found if weight is not None)
    return [(site, form) for site, form in forms if form is not None]
