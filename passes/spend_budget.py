"""Spends a budget among sites where it lowers the drift of outputs most; what passes share that search by sensitivity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bmgraph.ir.eval_form import in_eval
from bmgraph.ir.program import Program, output_node
from bmgraph.pass_manager.context import Context

BATCHES = 1
"""How many calibration batches tell how sensitive a site is: the model runs on them once for each."""


def spent(
    drifts: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], levels: Sequence[int], average: float
) -> dict[str, int]:
    """Site -> level, where all begin with the lowest, and the step with the largest fall of drift for each unit is next.

    A level costs its number for each unit of `sizes`, and their mean over all units may be `average`. Steps that no longer fit into
    the budget are left out; a step may skip levels.
    """
    found = dict.fromkeys(sizes, levels[0])
    left = average * sum(sizes.values()) - levels[0] * sum(sizes.values())
    while True:
        steps = [
            ((drifts[site][now] - drifts[site][more]) / (sizes[site] * (more - now)), site, more)
            for site, now in found.items()
            for more in levels
            if more > now and sizes[site] * (more - now) <= left
        ]
        best = max(steps, key=lambda step: step[0], default=None)
        if best is None or best[0] <= 0:
            return found
        _, site, more = best
        left -= sizes[site] * (more - found[site])
        found[site] = more


def float_outputs(program: Program, context: Context) -> list[torch.Tensor]:
    """The floating-point outputs on the calibration batches that are measured."""
    values: Any = output_node(program.graph).args[0]
    names = [
        in_eval(node).name
        for node in values
        if node.op != "placeholder" and node.meta["val"].is_floating_point()
    ]
    seen: list[torch.Tensor] = []
    context.calibrate(program, set(names), lambda name, value: seen.append(value.detach().clone()), BATCHES)
    return seen
