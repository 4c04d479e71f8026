"""AWQ (Lin et al. 2023, arXiv:2306.00978): channels that carry large values get more of the codes' range, by scales that fold away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from bmgraph.deltas.backbone import backbone_of
from bmgraph.ir.editor import Editor
from bmgraph.ir.eval_form import in_eval
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import CALIBRATION, Context
from bmgraph.pass_manager.layer_calibration import LayerPart
from bmgraph.pass_manager.layer_sites import InputSums
from bmgraph.pass_manager.pass_base import ModelPass
from bmgraph.passes.channel_scaling import ScalableInput, balanced, by_source, scalable_inputs, scale_input
from bmgraph.passes.quantize.block_codes import BlockCodes
from bmgraph.passes.quantize.code_grid import CodeGrid, rounded
from bmgraph.passes.quantize.mse import SHARES
from bmgraph.utils.digest import fingerprint
from bmgraph.utils.stored_tensor import in_memory

ALPHAS = tuple(step / 20 for step in range(20))
"""The powers of the sizes of channels that are tried as their scales."""

ROWS = 4096
"""Outputs whose scales are searched at once."""


@dataclass(frozen=True, repr=False)
class ScaleChannels(ModelPass):
    """Multiply the weights of linears by a power of the sizes of their inputs, and divide what gives these inputs: outputs stay.

    The power is the one of ALPHAS with which the nearest codes of `bits` bits in groups of `group` inputs move the outputs
    least, on calibration data, layer after layer. Inputs whose division does not fold into a norm or a linear of the same
    layer stay as they are. A part of `Quantize("int4", method="awq")`.
    """

    may_match_nothing: ClassVar[bool] = True

    bits: int = 4
    group: int = 32
    positive: bool = False
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    symmetric: bool = field(default=True, kw_only=True)

    @property
    def resources(self) -> tuple[str, ...]:
        """Calibration batches."""
        return (CALIBRATION,)

    def run(self, program: Program, context: Context) -> Program:
        """Scale the inputs of the chosen linears, part after part."""
        plans = scalable_inputs(program, context, self.include, self.exclude, multiply=False)
        context.calibrate_layers(program, lambda part: self._scale(program, context, part, plans))
        if context.edits:  # a delta that was trained on the weights as they were must be rejected
            program.fingerprint = fingerprint(backbone_of(program))
        return program

    def _scale(
        self, program: Program, context: Context, part: LayerPart, plans: Sequence[ScalableInput]
    ) -> None:
        own, found = set(part.nodes), []
        for plan in plans:
            if plan.readers[0][0] not in own:
                continue
            assert plan.source is not None
            if plan.source.node in own and all(linear in own for linear, _ in plan.readers):
                found.append(plan)
            else:
                context.declined(plan.site, "what gives its input is of another layer, which has run already")
        if not found:
            return
        chosen = context.kept(f"scales of {part}", lambda: self._searched(program, part, found))
        with program.edit(by=str(self)) as editor:
            for plan, scales in zip(found, chosen):
                if bool((scales != 1).any()):
                    scale_input(editor, context, plan, scales)

    def _searched(
        self, program: Program, part: LayerPart, plans: Sequence[ScalableInput]
    ) -> list[torch.Tensor]:
        """The scales of each input, by what flows into the part."""
        sums, form = InputSums(whole=True), BlockCodes(self.bits, self.group, self.positive, self.symmetric)
        part.observe({in_eval(plan.x).name for plan in plans}, sums.add)
        found, scaled = [], Editor(program.clone())  # one plan divides weights that another reads
        for plan in plans:
            weights = [in_memory(scaled.program.tensor(weight.site)) for _, weight in plan.readers]
            turned = [
                value.T if weight.transposed else value for value, (_, weight) in zip(weights, plan.readers)
            ]
            scales = searched_channels(form, turned, sums.of([plan.readers[0][0]]), plan.channels)
            if bool((scales != 1).any()):
                scale_input(scaled, Context(), plan, scales)
            found.append(scales)
        return found


def searched_channels(
    form: BlockCodes, weights: Sequence[torch.Tensor], second: torch.Tensor, channels: torch.Tensor
) -> torch.Tensor:
    """The scales f64[K] of inputs with which the nearest codes of weights f[N, K] that read them move outputs least.

    `second` f64[K, K]: X^T X of the inputs X; `channels` i64[K]: inputs of the same number get the same scale.
    """
    size = by_source(second.diagonal().sqrt().cpu(), channels)
    known, moments = size > 0, second.float()
    best, found = torch.inf, torch.ones_like(size)
    for alpha in ALPHAS:
        scales = balanced(alpha * size.clamp(min=1e-300).log(), known)
        error = sum(
            _moved(form, weight.float(), scales.to(second.device).float(), moments) for weight in weights
        )
        if error < best:
            best, found = error, scales
    return found


def _moved(form: BlockCodes, weight: torch.Tensor, scales: torch.Tensor, moments: torch.Tensor) -> float:
    """The square error of the outputs of a weight f[N, K] whose columns are rounded at `scales` f[K] times their size."""
    wide = weight * scales
    near = rounded(form.in_blocks(wide), form.widest(wide), form.least, form.most).flatten(1)
    lost = near[:, : weight.shape[1]] / scales - weight
    return float(((lost @ moments) * lost).sum(dtype=torch.float64))


def awq(form: BlockCodes, weight: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, CodeGrid]:
    """The nearest codes i8[N, K] of a weight f[N, K], on the grids [N, B] whose blocks move outputs least.

    `second` f64[K, K]: X^T X of the inputs X. `ScaleChannels` has scaled these before.
    """
    grid = form.empty(weight)
    for first in range(0, len(weight), ROWS):
        rows = slice(first, first + ROWS)
        grid.set(rows, searched_blocks(form, weight[rows].float(), second))
    grid = grid.typed(weight.dtype)
    return form.nearest(weight.float(), grid.typed(torch.float32)), grid


def searched_blocks(form: BlockCodes, weight: torch.Tensor, second: torch.Tensor) -> CodeGrid:
    """The grid of each block [N, B], at SHARES of the widest one's steps, with the least square error of what the block adds to outputs."""
    blocks, found = form.in_blocks(weight).transpose(0, 1), form.widest(weight).turned()
    left = -len(second) % form.block
    filled = torch.nn.functional.pad(second, (0, left, 0, left)).float()
    own = filled.reshape(len(blocks), form.block, len(blocks), form.block)
    moments = own.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
    best = torch.full_like(found.scale, torch.inf)
    for tried in found.smaller(SHARES, form.least, form.most):
        lost = rounded(blocks, tried, form.least, form.most) - blocks
        error = ((lost @ moments) * lost).sum(-1)
        found = tried.where(error < best, found)
        best = torch.minimum(best, error)
    return found.turned()
