"""Finds pairs of linears between which values can be rotated: those of each head of an attention, and others without anything between."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from bmgraph.analysis.channel_sources import ChannelSources, MixableSource
from bmgraph.analysis.structure.sites import Structure
from bmgraph.analysis.weight_sites import Weight, linears, weight_of
from bmgraph.ir.node_role import is_delta
from bmgraph.ir.program import Program
from bmgraph.ops.traits import argument
from bmgraph.pass_manager.context import Context
from bmgraph.passes.channel_scaling import why_kept

VERB = "rotate"


@dataclass(frozen=True)
class InnerPlan:
    """A linear that gives values and the one that reads them, and the channels of each that a matrix f64[n, n] multiplies.

    `source`: the call of the first. `given` i64[G, n]: outputs of the first; `read` i64[H, n]: inputs of the second.
    """

    source: fx.Node
    first: Weight
    second: Weight
    given: torch.Tensor
    read: torch.Tensor

    @property
    def bias(self) -> str | None:
        """The bias of the first linear."""
        bias = argument(self.source, "bias")
        return str(bias.target) if isinstance(bias, fx.Node) else None

    @property
    def size(self) -> int:
        """The size of the matrix."""
        return int(self.given.shape[1])


def inner_plans(
    program: Program, structure: Structure, context: Context, taken: set[tuple[str, int]]
) -> list[InnerPlan]:
    """All pairs; the output linears of attentions that are in none are declined. `taken`: dimensions of tensors that are rotated
    otherwise."""
    sources, outputs = ChannelSources(program), {item.o for item in structure.attentions}
    changed = {node.meta.get("site") for node in program.graph.nodes if is_delta(node)}
    found: list[InnerPlan] = []
    for linear in linears(program.graph):
        weight = weight_of(program, linear)
        if weight is None:
            continue
        plan = _plan(program, structure, sources, linear, weight, changed)
        if isinstance(plan, InnerPlan) and not taken & {
            (plan.first.site, plan.first.channel_axis),
            (plan.second.site, 1 - plan.second.channel_axis),
        }:
            found.append(plan)
        elif isinstance(plan, str) and weight.site in outputs:
            context.declined(weight.site, f"the values that it reads: {plan}")
    return found


def _plan(
    program: Program,
    structure: Structure,
    sources: ChannelSources,
    linear: fx.Node,
    weight: Weight,
    changed: set[object],
) -> InnerPlan | str:
    """The pair that ends with a linear, or why there is none."""
    reason = _why_kept(program, structure, weight, changed)
    x = linear.args[0]
    assert isinstance(x, fx.Node)
    if reason:
        return reason
    if len(x.users) != 1:
        return f"{next(user for user in x.users if user is not linear).name} reads them too"
    source = sources.mixable(x)
    if not isinstance(source, MixableSource):
        return source
    if source.groups.shape[1] < 2:
        return "its heads have one value each"
    first = weight_of(program, source.node)
    if first is None:
        return "the weight of what gives them is an expression"
    reason = _why_kept(program, structure, first, changed)
    if reason:
        return f"of what gives them, {reason}"
    bias = argument(source.node, "bias")
    plain = bias is None or (bias.op == "get_attr" and str(bias.target) in program.parameters)
    if not plain or (bias is not None and len(bias.users) != 1):
        return "the bias of what gives them has another reader, or is no plain parameter"
    return InnerPlan(source.node, first, weight, source.groups, source.blocks)


def _why_kept(program: Program, structure: Structure, weight: Weight, changed: set[object]) -> str:
    reason = why_kept(program, weight, structure.roles.get(weight.site, ""), VERB)
    if not reason and weight.site in changed:
        return "a delta changes it: rotate before the delta is added, or after Merge"
    return reason
