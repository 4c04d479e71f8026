"""The products whose weights `Quantize` rounds, and why it leaves the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from bmgraph.analysis.site_filter import matches
from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.weight_sites import Weight, products, read_elsewhere, unnamed_weights, weight_of
from bmgraph.ir.evaluation import upstream
from bmgraph.ir.program import Program
from bmgraph.lowering.store_codes import TRAINED
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.target import Target
from bmgraph.passes.quantize.weight_format import WeightFormat


@dataclass(frozen=True)
class SiteRules:
    """What decides whether a weight is rounded, beside the globs: the format of its codes and the name of its scheme, the target,
    the least side of a weight, whether tables of embeddings are rounded, and the name of a method that fills zeros, empty for another.
    `trains`: the weights go on training, rounded at every step."""

    form: WeightFormat
    scheme: str
    target: Target
    smallest: int
    embeddings: bool
    method: str
    trains: bool = False


def chosen_sites(
    program: Program, context: Context, rules: SiteRules, include: Sequence[str], exclude: Sequence[str]
) -> list[tuple[fx.Node, Weight]]:
    """The chosen products with their weights, in order; the others are declined."""
    found = [
        (node, weight) for node in products(program.graph) if (weight := weight_of(program, node)) is not None
    ]
    roles = find(program).roles
    axes: dict[str, set[int]] = {}
    for _, weight in found:
        axes.setdefault(weight.site, set()).add(weight.channel_axis)
    chosen = []
    declined = {
        site: reason
        for site, reason in unnamed_weights(program).items()
        if matches(site, include) and not matches(site, exclude)
    }
    for linear, weight in found:
        if not matches(weight.site, include) or matches(weight.site, exclude):
            continue
        reason = _reason_to_decline(weight, rules, roles.get(weight.site, ""))
        if len(axes[weight.site]) > 1:
            reason = "its outputs lie along one axis in one use and along the other in another"
        if reason:
            declined[weight.site] = reason
        else:
            chosen.append((linear, weight))
    for site, reason in declined.items():
        context.declined(site, reason)
    return chosen


def _reason_to_decline(weight: Weight, rules: SiteRules, role: str) -> str:
    """Why a weight cannot be quantized; empty where it can."""
    value = weight.node.meta["val"]
    if not value.is_floating_point() or value.dim() not in (2, 3):
        return f"its weight is {value.dtype} of {value.dim()} dimensions"
    if any(item.target in TRAINED for item in upstream(weight.node)):
        return "it trains in codes already"
    if value.dim() == 3 and rules.trains:
        return "experts do not train in codes: quantize them after training"
    if value.dim() == 3 and not rules.form.takes_experts(rules.target):
        return f"{rules.target.name} has no kernel for experts in such {rules.scheme} codes"
    if role == "router":
        return "it is a router: rounding its weight would change which experts it selects"
    rows, columns = (size * (value.shape[0] if value.dim() == 3 else 1) for size in value.shape[-2:])
    if min(rows, columns) < rules.smallest:
        return f"its weight is only {rows} x {columns}, below smallest={rules.smallest}"
    if rules.method and _is_masked(weight.node):
        return f"its weight is masked, and {rules.method} would fill the zeros: use the method rtn, or prune afterwards"
    if read_elsewhere(weight):
        return "something else reads its weight too (a tied embedding)" + (
            ": Quantize(embeddings=8) rounds both after training"
            if rules.trains
            else ""
            if rules.embeddings or rules.form.granularity == "channel"
            else ": embeddings=8 quantizes both"
        )
    return ""


def _is_masked(node: fx.Node) -> bool:
    """Whether a weight is an expression with a boolean mask."""
    return any(item.op == "get_attr" and item.meta["val"].dtype == torch.bool for item in upstream(node))
