"""Passes of the step stage for tests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from bmgraph.ir.program import output_node
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, StepPass
from bmgraph.training.recompute_weights import recompute_weights
from bmgraph.training.step_program import StepProgram

aten = torch.ops.aten


@dataclass(frozen=True, repr=False)
class HalfStorage(StepPass):
    """Store what trains in bfloat16 and compute in float32; the float32 masters stay with the optimizer's state."""

    effect: ClassVar[Effect] = "intended"

    def run(self, step: StepProgram, context: Context) -> StepProgram:
        """Change the dtype of the values' places, and cast where the graph reads them."""
        half = torch.bfloat16
        reads = step.reads()
        first = next(node for node in step.graph.nodes if node.op != "placeholder")
        for name in step.trained:
            value, place, state = step.tensors[name], step.places[name], step.updates[name].state
            cut = state.split and not place.split
            step.masters[name] = (place.chunk(value, step.ranks.rank) if cut else value).clone()
            step.tensors[name], step.places[name] = value.to(half), replace(place, dtype=half)
            node: Any = reads[name]
            node.meta["val"] = node.meta["val"].to(half)
            wide = step.call(aten._to_copy.default, node, dtype=torch.float32, before=first)
            node.replace_all_uses_with(wide, delete_user_cb=lambda user, wide=wide: user is not wide)
        assert not set(output_node(step.graph).all_input_nodes) & set(reads.values())
        if not step.shared:
            recompute_weights(step)
        context.edited("values", "bf16")
        return step
