"""What units are compared by: their weights, what they give on data, or what the loss loses without them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import torch
from torch import fx

from bmgraph.analysis.coupling.coupled_dims import NONE, Labels, Spread
from bmgraph.analysis.coupling.op_rules import DimRef, rank
from bmgraph.analysis.interpreter import Observed, evaluate, reads_no_input
from bmgraph.analysis.weight_sites import linears
from bmgraph.errors import InputError, PassError, ResourceError
from bmgraph.ir.categorical_input import fill_categorical
from bmgraph.ir.eval_form import in_eval
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of
from bmgraph.pass_manager.context import Context
from bmgraph.passes.shrink.sites import SpreadSite
from bmgraph.utils.progress import track

MAGNITUDE, ACTIVATION, TAYLOR, RANDOM = "magnitude", "activation", "taylor", "random"

GATES = "gates"
"""Not a score: gates that were trained say which units go."""

SCORES = (MAGNITUDE, ACTIVATION, TAYLOR, RANDOM, GATES)
"""The squares of a unit's weights; the squares of what it adds to the outputs of the linears that read it, over calibration data;
the change of the loss without it, to first order, |gradient x value| (Molchanov et al. 2017, arXiv:1611.06440; Michel et al. 2019,
arXiv:1905.10650); random numbers, as a control."""


def unit_scores(
    score: str, program: Program, sites: Sequence[SpreadSite], seed: int, context: Context
) -> list[torch.Tensor]:
    """The importance of each unit of each site, f64[units]: comparable between sites."""
    if score == MAGNITUDE:
        return [magnitude(program, item.spread, item.site.count) for item in sites]
    if score == RANDOM:
        return [random_score(item.site.name, item.site.count, seed) for item in sites]
    if program.device.type == "meta":
        raise PassError(
            f"{score} measures, and a program on the meta device has no values: give it weights first"
        )
    measure = activation if score == ACTIVATION else taylor
    return context.kept(f"{score} of units", lambda: measure(program, sites, context))


def magnitude(program: Program, spread: Spread, units: int) -> torch.Tensor:
    """Each unit's share of the squares of all coupled matrices, times the number of units: 1 on average.

    All matrices count the same, so that scores can be compared between sites.
    """
    shares = [
        _squares(evaluate(program, weight), dim, spread.labels[weight, dim], units)
        for weight, dim in _matrices(program, spread)
    ]
    return torch.stack([units * share / share.sum().clamp(min=1e-30) for share in shares]).mean(0)


def activation(program: Program, sites: Sequence[SpreadSite], context: Context) -> list[torch.Tensor]:
    """Each unit's share of the squares of what is added to the outputs of its readers, times the number of units."""
    readers = [_readers(program, item.spread) for item in sites]
    squares: dict[tuple[str, int], torch.Tensor] = {}
    axes: dict[str, set[int]] = {}
    for node, axis in (ref for found in readers for ref in found):
        axes.setdefault(in_eval(node).name, set()).add(axis)

    def visit(name: str, value: torch.Tensor) -> None:
        for axis in axes[name]:
            found = value.double().square().movedim(axis, 0).flatten(1).sum(1).cpu()
            squares[name, axis] = squares.get((name, axis), 0.0) + found

    context.calibrate(program, set(axes), visit)
    scores = []
    for item, found in zip(sites, readers):
        units = item.site.count
        shares = [
            _by_unit(squares[in_eval(node).name, axis] * gain, item.spread.labels[node, axis], units)
            for (node, axis), gain in found.items()
        ]
        scores.append(torch.stack([units * share / share.sum().clamp(min=1e-30) for share in shares]).mean(0))
    return scores


def taylor(program: Program, sites: Sequence[SpreadSite], context: Context) -> list[torch.Tensor]:
    """The mean over rows of |sum of gradient x value| over all that a unit gives to its readers."""
    readers = [_readers(program, item.spread) for item in sites]
    names = {in_eval(node).name for found in readers for node, _ in found}
    scores = [torch.zeros(item.site.count, dtype=torch.double) for item in sites]
    rows = 0
    for values in gradients(program, names, context):
        for item, found, score in zip(sites, readers, scores):
            changes: torch.Tensor | float = 0.0
            for node, axis in found:
                value, gradient = values[in_eval(node).name]
                labels = item.spread.labels[node, axis]
                changes = changes + _changes(value * gradient, axis, labels, item.site.count)
            assert isinstance(changes, torch.Tensor)
            score += changes.abs().sum(0)
        rows += 1
    return [score / rows for score in scores]


def gradients(
    program: Program, names: set[str], context: Context
) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """For each calibration batch the values of nodes and the gradients of the program's loss by them, in eval form.

    Raises PassError for a program without a loss, ResourceError where a batch does not fit the program.
    """
    if not program.losses:
        raise PassError(
            f"score={TAYLOR!r} reads the gradient of a loss, and the program has none: capture the model with labels in the "
            "example, or choose another score"
        )
    observed = Observed(program)
    for count, batch in enumerate(track(context.batches(), "reading gradients")):
        try:
            filled = fill_categorical(program.inputs, batch, start=count)
            yield observed.gradients(filled, names, program.losses[0])
        except InputError as error:
            raise ResourceError(f"calibration batch {count} does not fit the program: {error}") from error


def random_score(name: str, units: int, seed: int) -> torch.Tensor:
    """Random numbers f64[units] for a site, by its name."""
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    return torch.rand(units, generator=generator, dtype=torch.double)


def _readers(program: Program, spread: Spread) -> dict[DimRef, torch.Tensor | float]:
    """What gives the units to products: the features that linears sum over, with the squares of the weights that read each; and
    those in which queries and keys are compared."""
    found: dict[DimRef, torch.Tensor | float] = {}
    for node in program.graph.nodes:
        row = traits_of(node)
        if row.kind is Kind.LINEAR:
            x, weight = node.args[0], node.args[1]
            ref = (x, rank(x) - 1)
            if ref in spread.labels:
                gain = (
                    evaluate(program, weight).double().square().sum(0).cpu()
                    if reads_no_input(weight)
                    else 1.0
                )
                found[ref] = found.get(ref, 0.0) + gain
        elif row.kind in (Kind.ATTENTION, Kind.BATCHED_PRODUCT):
            first, second = (node.args[place] for place in row.factors)
            back = 1 if row.kind is Kind.ATTENTION else 2
            for ref in ((first, rank(first) - 1), (second, rank(second) - back)):
                if ref in spread.labels and _is_measured(ref[0]):
                    found.setdefault(ref, 1.0)
    return found


def _is_measured(node: fx.Node) -> bool:
    return node.op == "call_function" and not reads_no_input(node)


def _matrices(program: Program, spread: Spread) -> list[DimRef]:
    """The weights of linears whose rows or columns belong to units."""
    weights: list[fx.Node] = [node.args[1] for node in linears(program.graph)]  # type: ignore[misc]
    dims = [(weight, dim) for weight in dict.fromkeys(weights) for dim in (0, 1)]
    return [item for item in dims if item in spread.labels and reads_no_input(item[0])]


def _squares(weight: torch.Tensor, dim: int, labels: Labels, units: int) -> torch.Tensor:
    """The sum of squares of each unit's part of a weight."""
    squares = weight.double().square().sum(1 - dim)
    if squares.device.type == "meta":
        return torch.ones(units, dtype=torch.double)
    return _by_unit(squares.cpu(), labels, units)


def _by_unit(values: torch.Tensor, labels: Labels, units: int) -> torch.Tensor:
    """The sum of the values of each unit, f64[units]; what belongs to none, or to one behind the last, is left out."""
    counted = (labels != NONE) & (labels < units)
    return torch.zeros(units, dtype=torch.double).index_add_(0, labels[counted], values[counted])


def _changes(product: torch.Tensor, axis: int, labels: Labels, units: int) -> torch.Tensor:
    """The sums of a product over each unit, f64[rows, units]; one row where axis 0 is that of the units."""
    moved = product.double().cpu().movedim(axis, -1)
    summed = moved.flatten(1, -2).sum(1) if moved.dim() > 2 else moved
    counted = labels != NONE
    return torch.zeros(len(summed), units, dtype=torch.double).index_add_(
        1, labels[counted], summed[:, counted]
    )
