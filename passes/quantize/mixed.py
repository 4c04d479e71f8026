"""Codes of several sizes by a budget: the bits of each site, chosen by how far outputs drift where layers are rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.structure.layer_parts import cut_at_layers
from bmgraph.analysis.weight_sites import Weight
from bmgraph.errors import InputError, PassError
from bmgraph.ir.program import Program
from bmgraph.ops.block_codes import BITS
from bmgraph.pass_manager.context import Context
from bmgraph.passes.quantize.block_codes import BlockCodes
from bmgraph.passes.spend_budget import BATCHES, float_outputs, spent
from bmgraph.verify.metrics import relative_error
from bmgraph.verify.site_outputs import SiteOutputErrors

Sites = Sequence[tuple[fx.Node, Weight]]


def smallest_codes(average: float) -> int:
    """The size of the smallest codes of a budget: the largest that is no more than `average`. Raises InputError without one."""
    found = [bits for bits in BITS if bits <= average]
    if not found or not average <= max(BITS):
        nearest = max(BITS) if average > max(BITS) else min(BITS)
        raise InputError(
            f"average={average:g} cannot be met: codes have {' or '.join(map(str, BITS))} bits; the nearest is average={nearest}"
        )
    return max(found)


def bits_within(available: Sequence[int], average: float, target: str) -> tuple[int, ...]:
    """The sizes of codes to choose from: the largest that is no more than `average`, and all above.

    Raises PassError, which says what is nearest, where the budget is below or above all that the target has.
    """
    if not min(available) <= average <= max(available):
        sizes = " and ".join(map(str, sorted(available)))
        nearest = min(available) if average < min(available) else max(available)
        raise PassError(
            f"average={average:g} cannot be met: {target} has codes of {sizes} bits; the nearest is average={nearest}"
        )
    lowest = max(bits for bits in available if bits <= average)
    return tuple(sorted(bits for bits in available if bits >= lowest))


def choose_bits(
    program: Program, context: Context, sites: Sites, forms: Mapping[int, BlockCodes], average: float
) -> dict[str, int]:
    """Site -> the bits of its codes, such that weights have at most `average` bits, scales not counted.

    Every layer is rounded to the fewest bits by itself, and the squared drift of the program's outputs (relative L2, on
    BATCHES calibration batches) divided among its sites by the squared errors of their own outputs; with more bits a site's
    share falls as its own error does. The site whose drift falls most for each bit gets more, until the budget is used up.
    """
    bits = sorted(forms)
    errors = {
        size: context.kept(
            f"errors of codes of {size} bits", partial(_own_errors, program, context, sites, forms[size])
        )
        for size in bits
    }
    lowest = errors[bits[0]]
    drifts: dict[str, dict[int, float]] = {}
    before = float_outputs(program, context)

    def drift_of(group: Sequence[str]) -> float:
        own = [item for item in sites if item[1].site in group]
        after = float_outputs(_with_nearest(program, own, forms[bits[0]]), context)
        return max(map(relative_error, after, before), default=0.0)

    for group in _groups(program, sites):
        whole = sum(lowest[site] ** 2 for site in group)
        drift = context.kept(f"drift by {group[0]} and beside it", partial(drift_of, group))
        for site in group:
            scale = drift**2 / whole if whole > 0 else 0.0
            drifts[site] = {size: scale * errors[size][site] ** 2 for size in bits}
    sizes = {weight.site: weight.node.meta["val"].numel() for _, weight in sites}
    return spent(drifts, sizes, bits, average)


def _own_errors(program: Program, context: Context, sites: Sites, form: BlockCodes) -> dict[str, float]:
    """The relative error (L2) of the outputs of each site's products, with its nearest codes."""

    def replace(
        product: fx.Node, weight: Weight, x: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return x, _rounded(form, weight, value)

    outputs = SiteOutputErrors(program, sites, replace)
    context.calibrate(program, outputs.names, outputs.visit, BATCHES)
    return {weight.site: outputs.errors.get(weight.site, 0.0) for _, weight in sites}


def _rounded(form: BlockCodes, weight: Weight, value: torch.Tensor) -> torch.Tensor:
    """A weight at its nearest codes."""
    return form.decode(form.encode(value, weight.channel_axis), value.shape, weight.channel_axis)


def _groups(program: Program, sites: Sites) -> list[list[str]]:
    """The sites of each layer; those outside of layers each alone."""
    parts = cut_at_layers(program)
    groups: dict[object, list[str]] = {}
    for product, weight in sites:
        part = parts.part_of.get(product, 0)
        key: object = part if parts.layers[part] else weight.site
        if all(weight.site not in group for group in groups.values()):
            groups.setdefault(key, []).append(weight.site)
    return list(groups.values())


def _with_nearest(program: Program, sites: Sites, form: BlockCodes) -> Program:
    """A copy whose weights at these sites are at their nearest codes."""
    changed = program.clone()
    nodes = {node.name: node for node in changed.graph.nodes}
    with changed.edit() as editor:
        for weight in {weight.site: weight for _, weight in sites}.values():
            value, node = evaluate(program, weight.node), nodes[weight.node.name]
            reader = editor.parameter(
                editor.fresh(f"{weight.site}_nearest"), _rounded(form, weight, value), like=node, frozen=True
            )
            node.replace_all_uses_with(reader)
    return changed
