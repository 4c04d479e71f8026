"""Weights that are read at their nearest codes while they train, and the steps of these codes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.weight_sites import Weight
from bmgraph.ir.editor import Editor
from bmgraph.ir.evaluation import upstream
from bmgraph.ir.node_role import NodeRole
from bmgraph.ir.program import Program
from bmgraph.passes.quantize.code_grid import Encoded
from bmgraph.passes.quantize.weight_format import WeightFormat
from bmgraph.utils.stored_tensor import in_memory

STATIC = torch.ops.bmgraph.quantize_static.default


@dataclass
class RoundedWeights:
    """Puts `fake_quantize` in front of weights. `learned`: steps train where their weights do.

    `sizes`: the root mean square of each weight that was placed, by site.
    """

    program: Program
    learned: bool
    sizes: dict[str, float] = field(default_factory=dict)

    def trains(self, weight: Weight) -> bool:
        """Whether the step of a weight trains."""
        names = {str(item.target) for item in upstream(weight.node) if item.op == "get_attr"}
        return self.learned and bool(names & (set(self.program.parameters) - self.program.frozen))

    def keep(self, editor: Editor, form: WeightFormat, weight: Weight, stored: Encoded) -> fx.Node:
        """Round a weight, whose values stay, at the scales of its codes."""
        value = in_memory(evaluate(self.program, weight.node))
        return self._round(editor, form, weight, weight.node, stored.scale, value)

    def move(self, editor: Editor, form: WeightFormat, weight: Weight, stored: Encoded) -> fx.Node:
        """Let a weight begin at the values of its codes, which are not the nearest ones to what it was, and round it."""
        axis, node = weight.channel_axis, weight.node
        value = form.decode(stored, node.meta["val"].shape, axis).contiguous()
        if node.op == "get_attr":
            reader = editor.assign(str(node.target), value)
        else:
            reader = editor.parameter(editor.fresh(weight.site), value, like=node, part=NodeRole.WEIGHT)
        return self._round(editor, form, weight, reader, stored.scale, value)

    def _round(
        self,
        editor: Editor,
        form: WeightFormat,
        weight: Weight,
        reader: fx.Node,
        scale: torch.Tensor,
        value: torch.Tensor,
    ) -> fx.Node:
        name, trains, like = (
            editor.fresh(f"{weight.site}_step"),
            self.trains(weight),
            min(weight.node.users),
        )
        step = editor.parameter(name, scale, like=weight.node, frozen=not trains, part=NodeRole.STEP)
        self.sizes[weight.site] = float(value.double().square().mean().sqrt())
        if trains:
            self._set_rate(name, weight.site)
        return form.simulate(editor, Weight(weight.site, reader, weight.transposed), step, like)

    def set_rates_of_inputs(self, by: str) -> None:
        """Set the learning rates of the static scales that the pass `by` lets train."""
        for node in self.program.graph.nodes:
            if node.target is STATIC and node.meta.get("pass") == by:
                name = str(node.args[1].target)
                if name not in self.program.frozen:
                    self._set_rate(name, str(node.meta["site"]))

    def _set_rate(self, name: str, site: str) -> None:
        """Let steps move as their weights do in proportion to their size, under optimizers whose moves do not depend on gradients' sizes."""
        step, size = float(self.program.tensor(name).double().abs().mean()), self.sizes[site]
        if step > 0 and size > 0:
            self.program.lr_factors = {**self.program.lr_factors, name: step / size}
