"""Sites that keep floating-point weights, since rounding would move their outputs too far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from bmgraph.analysis.weight_sites import Weight
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.passes.quantize.attention_inputs import AttentionInputs
from bmgraph.passes.quantize.code_grid import Encoded
from bmgraph.passes.quantize.mse import ScaleRule
from bmgraph.passes.quantize.round_inputs import InputRounding
from bmgraph.passes.quantize.weight_format import WeightFormat
from bmgraph.verify.site_outputs import SiteOutputErrors

MEASURED_BATCHES = 2
"""Number of calibration batches on which the drift of a site is measured."""


def within_drift(
    program: Program,
    context: Context,
    sites: Sequence[tuple[fx.Node, Weight]],
    forms: Mapping[str, WeightFormat],
    rule: ScaleRule | None,
    rounding: InputRounding,
    attention: AttentionInputs,
    bound: float,
) -> list[tuple[fx.Node, Weight]]:
    """The sites whose output changes by at most `bound` (relative L2) on calibration data; the others are declined.

    A weight that is used several times stays as it is for all uses where one of them changes by more. `attention` measures its
    queries and keys in the same run.
    """
    known: dict[str, Encoded] = {}  # the program will hold as many bytes

    def replace(
        linear: fx.Node, weight: Weight, x: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        axis, form = weight.channel_axis, forms[weight.site]
        if weight.site not in known:
            known[weight.site] = form.encode(value, axis, rule)
        return rounding.value(linear, x), form.decode(known[weight.site], value.shape, axis)

    outputs = SiteOutputErrors(program, sites, replace)
    entered = outputs.names

    def visit(name: str, value: torch.Tensor) -> None:
        attention.visit(name, value)
        if name in entered:
            outputs.visit(name, value)

    context.calibrate(program, entered | attention.names, visit, MEASURED_BATCHES)
    worst = outputs.errors
    for site, error in worst.items():
        if not error <= bound:
            context.declined(
                site, f"its output would change by {error:.3f} (relative), more than site_drift={bound:g}"
            )
    return [(linear, weight) for linear, weight in sites if worst.get(weight.site, 0.0) <= bound]
