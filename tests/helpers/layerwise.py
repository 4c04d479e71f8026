"""A toy method that calibrates: 4-bit weights as GPTQ assigns them, layer by layer, and the naive way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from bmgraph.analysis.structure.layer_parts import cut_at_layers
from bmgraph.analysis.weight_sites import Weight
from bmgraph.api import Context, Effect, LayerPart, ModelPass, Program, evaluate, products, weight_of
from bmgraph.ir.eval_form import in_eval
from tests.helpers.int4 import compensated


@dataclass(frozen=True, repr=False)
class LayerwiseInt4(ModelPass):
    """Products of layers get 4-bit weights. `naive`: the whole model runs for each layer; `memory`: as `calibrate_layers`."""

    effect: ClassVar[Effect] = "approximate"
    default_drift: ClassVar[float] = 10.0

    naive: bool = False
    memory: int = -1

    def run(self, program: Program, context: Context) -> Program:
        if self.naive:
            for number, layers in enumerate(parts := cut_at_layers(program).layers):
                if layers or len(parts) == 1:  # cut again: the calls that stand in for weights are new
                    part_of = cut_at_layers(program).part_of
                    found = [node for node in products(program.graph) if part_of[node] == number]
                    self._rewrite(
                        program, found, lambda names, visit: context.calibrate(program, names, visit), context
                    )
        else:

            def rewrite(part: LayerPart) -> None:
                if part.layers or len(cut_at_layers(program).layers) == 1:
                    self._rewrite(program, part.products, part.observe, context)

            context.calibrate_layers(program, rewrite, memory=None if self.memory < 0 else self.memory)
        return program

    def _rewrite(
        self,
        program: Program,
        found: list[fx.Node],
        observe: Callable[[set[str], Callable[[str, torch.Tensor], None]], object],
        context: Context,
    ) -> None:
        sites: dict[str, tuple[Weight, list[fx.Node]]] = {}
        for node in found:
            if node.target is torch.ops.aten.linear.default and (weight := weight_of(program, node)):
                sites.setdefault(weight.site, (weight, []))[1].append(node)
        seconds: dict[str, torch.Tensor] = {}

        def visit(name: str, x: torch.Tensor) -> None:
            rows = x.flatten(0, -2).double()
            seconds[name] = seconds.get(name, torch.zeros(())) + rows.T @ rows

        observe({self._input(node) for _, nodes in sites.values() for node in nodes}, visit)
        with program.edit(by=str(self)) as editor:
            for site, (weight, nodes) in sites.items():
                value = evaluate(program, weight.node)
                second = torch.stack([seconds[self._input(node)] for node in nodes]).sum(0)
                codes, scale = compensated(value.T if weight.transposed else value, second)
                if weight.transposed:
                    codes = codes.T.contiguous()
                readers = [
                    editor.parameter(f"{site}_{part}", tensor, like=weight.node, frozen=True, part=part)
                    for part, tensor in (("codes", codes), ("scale", scale.to(value.dtype)))
                ]
                made = editor.call(
                    torch.ops.bmgraph.dequantize.default, *readers, int(weight.transposed),
                    like=min(weight.node.users), site=site, part="weight",
                )  # fmt: skip
                weight.node.replace_all_uses_with(made)
                context.edited(site, "int4")

    def _input(self, product: fx.Node) -> str:
        """The name of what enters a product; `calibrate` shows no dropout, since eval form has none."""
        entering = product.args[0]
        assert isinstance(entering, fx.Node)
        return in_eval(entering).name if self.naive else entering.name
