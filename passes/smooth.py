"""Smooth: move the wide ranges of activation channels into weights, in front of 8-bit rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from bmgraph.analysis.site_filter import resolve_patterns
from bmgraph.analysis.weight_sites import Weight, product_sites
from bmgraph.deltas.backbone import backbone_of
from bmgraph.errors import InputError, PassError
from bmgraph.ir.eval_form import in_eval
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import CALIBRATION, Context
from bmgraph.pass_manager.pass_base import ModelPass
from bmgraph.passes.channel_scaling import balanced, by_source, scalable_inputs, scale_input
from bmgraph.utils.digest import fingerprint
from bmgraph.utils.stored_tensor import in_memory

SMOOTHED = "smoothed"
"""Provided by the pass."""


@dataclass(frozen=True, repr=False)
class Smooth(ModelPass):
    """Divide the channels that linears read by scales, and multiply their weights by these, so that channels have like ranges.

    A channel j of the input x of linears with weights W gets the scale max|x_j|^alpha / max|W_j|^(1 - alpha), the maxima of
    x over the calibration batches, those of W over all linears that read x. Outputs stay what they are, up to rounding. What
    gives x takes the division: the weight and bias of a norm that only these linears read, or of another linear, where every
    call in between passes a factor on: from the values of an attention to its output, from the up projection of a gated or
    ReLU feed-forward to the down projection. Elsewhere, behind a norm, x is multiplied by the inverse (`multiply=False` leaves
    such inputs alone).

    alpha: 0 levels the weights, 1 the activations; the default was best on a sentence encoder, where 0.3 to 0.9 were tried. include,
    exclude: globs over module paths of the linears that read x.

    Linears whose weight is quantized, masked, tied or used several times, those with a delta, and routers keep their input.
    Run it before Quantize and Prune, and after Merge. Source: Xiao et al. 2022, SmoothQuant (arXiv:2211.10438).

    Reads the calibration batches; raises ResourceError without them, PassError where a glob matches nothing or the program has
    no weights (meta device), InputError for an alpha out of range.

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.passes import Smooth
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.Linear(16, 8))
        >>> batch = {"input": torch.randn(4, 16)}
        >>> smooth = bg.Pipeline([Smooth()]).run(bg.capture(model, batch), calibration=[batch])
        >>> [edit.site for edit in smooth.history[-1].edits]
        ['1.weight']
    """

    provides: ClassVar[frozenset[str]] = frozenset({SMOOTHED})
    conflicts: ClassVar[frozenset[str]] = frozenset({"quantized"})
    may_match_nothing: ClassVar[bool] = True

    alpha: float = 0.65
    multiply: bool = True
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha={self.alpha}: give a number from 0 to 1")

    @property
    def resources(self) -> tuple[str, ...]:
        """Calibration batches, on which the maxima of channels are measured."""
        return (CALIBRATION,)

    def run(self, program: Program, context: Context) -> Program:
        """Smooth the inputs of the chosen linears."""
        if program.device.type == "meta":
            raise PassError("a program on the meta device has no values to measure: load its weights first")
        sites = product_sites(program)
        include = resolve_patterns(self.include, sites, "include")
        exclude = resolve_patterns(self.exclude, sites, "exclude")
        inputs = scalable_inputs(program, context, include, exclude, self.multiply)
        peaks = _peaks(program, context, [plan.x for plan in inputs])
        with program.edit(by=str(self)) as editor:
            for plan in inputs:
                columns = torch.stack([_largest_of_columns(program, weight) for _, weight in plan.readers])
                scales = _scales(peaks[in_eval(plan.x).name], columns.amax(0), plan.channels, self.alpha)
                scale_input(editor, context, plan, scales)
        if inputs:  # a delta that was trained on the weights as they were must be rejected
            program.fingerprint = fingerprint(backbone_of(program))
        return program


def _peaks(program: Program, context: Context, inputs: Sequence[fx.Node]) -> dict[str, torch.Tensor]:
    """The largest magnitude of each channel over all calibration batches, f64[channels] by node name."""
    found: dict[str, torch.Tensor] = {}

    def visit(name: str, value: torch.Tensor) -> None:
        if not value.numel():
            return
        peak = value.reshape(-1, value.shape[-1]).abs().amax(0).double().cpu()
        found[name] = torch.maximum(found[name], peak) if name in found else peak

    def measured() -> dict[str, torch.Tensor]:
        context.calibrate(program, {in_eval(x).name for x in inputs}, visit)
        return found

    if inputs:
        found = context.kept("largest magnitudes of channels", measured)
    widths = {in_eval(x).name: int(x.meta["val"].shape[-1]) for x in inputs}
    return {name: found.get(name, torch.zeros(width, dtype=torch.double)) for name, width in widths.items()}


def _largest_of_columns(program: Program, weight: Weight) -> torch.Tensor:
    """The largest magnitude of a weight for each of its inputs, f64[in]."""
    value = in_memory(program.tensor(weight.site))
    return value.abs().amax(weight.channel_axis).double().cpu()


def _scales(peaks: torch.Tensor, columns: torch.Tensor, channels: torch.Tensor, alpha: float) -> torch.Tensor:
    """f64[in]: the scale of each input, one for those that are the same channel of what gives them; their geometric mean is 1.

    `channels` i64[in]: the channel of the source that each input is.
    """
    rows, weights = by_source(peaks, channels), by_source(columns, channels)
    known = (rows > 0) & (weights > 0)
    logs = torch.where(
        known, alpha * rows.clamp(min=1e-300).log() - (1 - alpha) * weights.clamp(min=1e-300).log(), 0.0
    )
    return balanced(logs, known)
