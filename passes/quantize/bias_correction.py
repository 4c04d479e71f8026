"""Bias correction (Nagel et al. 2019, arXiv:1906.04721): what rounding adds to the mean of a linear's outputs is taken off its bias."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.weight_sites import Weight
from bmgraph.ir.editor import Editor
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import argument, traits_of
from bmgraph.pass_manager.context import Context
from bmgraph.passes.quantize.mse import ScaleRule
from bmgraph.passes.quantize.round_inputs import InputRounding
from bmgraph.passes.quantize.weight_format import WeightFormat
from bmgraph.verify.site_outputs import entering


def bias_of(program: Program, linear: fx.Node) -> str:
    """The name of the bias parameter f[N] that this linear alone reads; empty where it has none."""
    if traits_of(linear).kind is not Kind.LINEAR:
        return ""
    bias: object = argument(linear, "bias")
    if not isinstance(bias, fx.Node) or bias.op != "get_attr" or len(bias.users) != 1:
        return ""
    name = str(bias.target)
    tied = program.ties.get(name, name) != name or name in program.ties.values()
    return name if name in program.parameters and not tied else ""


def mean_errors(
    program: Program,
    context: Context,
    sites: Sequence[tuple[fx.Node, Weight]],
    forms: Mapping[str, WeightFormat],
    rule: ScaleRule | None,
    rounding: InputRounding,
) -> dict[str, torch.Tensor]:
    """Name of a bias -> the mean f64[N] over all rows of all calibration batches of what its linear's outputs lose by rounding."""
    readers: dict[str, list[fx.Node]] = {}
    owners: dict[str, tuple[fx.Node, Weight]] = {}
    for linear, weight in sites:
        if name := bias_of(program, linear):
            owners[name] = linear, weight
            readers.setdefault(entering(linear).name, []).append(linear)
    sums: dict[tuple[fx.Node, int], torch.Tensor] = {}
    counts: dict[str, int] = {}

    def visit(name: str, x: torch.Tensor) -> None:
        counts[name] = counts.get(name, 0) + x.numel() // x.shape[-1]
        for linear in readers[name]:
            for place, value in enumerate((x, rounding.value(linear, x))):
                total = value.reshape(-1, value.shape[-1]).double().sum(0)
                sums[linear, place] = sums[linear, place] + total if (linear, place) in sums else total

    context.calibrate(program, set(readers), visit)
    found = {}
    for name, (linear, weight) in owners.items():
        value, form = evaluate(program, weight.node), forms[weight.site]
        stored = form.encode(value, weight.channel_axis, rule)
        near = form.decode(stored, value.shape, weight.channel_axis)
        exact, rounded = (sums[linear, place] / max(counts[entering(linear).name], 1) for place in (0, 1))
        lost = _times(value, weight, exact) - _times(near, weight, rounded)
        found[name] = lost
    return found


def correct(editor: Editor, name: str, error: torch.Tensor) -> None:
    """Add the mean error to a bias."""
    value = editor.program.tensor(name)
    editor.assign(name, (value.double() + error.to(value.device)).to(value.dtype))


def _times(value: torch.Tensor, weight: Weight, x: torch.Tensor) -> torch.Tensor:
    """The outputs f64[N] of a weight for one input f64[K]."""
    matrix = value.double()
    return x @ matrix if weight.transposed else matrix @ x
