"""Verifies passes that claim to replace only weights and to round only activations."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import fx

import bmgraph.ops  # noqa: F401  (registers the operators of quantised programs)
from bmgraph.analysis.interpreter import Observed
from bmgraph.analysis.weight_sites import linears, site_value, weight_of
from bmgraph.errors import VerificationError
from bmgraph.ir.eval_form import in_eval
from bmgraph.ir.node_role import NodeRole, has_role
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Dims, Kind
from bmgraph.ops.traits import argument, traits_of
from bmgraph.verify.measures import Measure, Replaced
from bmgraph.verify.metrics import relative_error
from bmgraph.verify.reference_outputs import Batch, Reference, exact_bound

FARTHEST = 1e30
"""A value beyond all codes."""

NO_ROOM = "the program's weights do not fit in memory"


def check_weight_only(
    before: Program, after: Program, by: str, reference: Reference, measure: Measure
) -> None:
    """Verify the pass `by`: only weights and roundings differ between `before` and `after`.

    With the old weights restored and the roundings removed, `after` must reproduce the outputs of `reference`. The new
    weights must be within the bound of `measure`, and each rounded activation close to its unrounded value. Raises
    VerificationError, which names the site.
    """
    restored, replaced = after.clone(), replaced_weights(after, by)
    for node in list(restored.graph.nodes):
        if node.meta.get("pass") != by:
            continue
        if has_role(node, NodeRole.WEIGHT) and node.meta.get("site"):
            site = str(node.meta["site"])
            with restored.graph.inserting_before(node):
                reader = restored.graph.get_attr(f"restored.{site}")
            restored.parameters[f"restored.{site}"] = site_value(before, site)
            node.replace_all_uses_with(reader)
        elif traits_of(node).kind is Kind.ROUNDING:
            node.replace_all_uses_with(node.args[0])
    if measure.biases:
        _restore_biases(before, restored, {site for site, _ in replaced})
    measure.check(before, after, replaced, reference.batches[: reference.measured])
    restored.graph.eliminate_dead_code()
    measured = reference.without_probe()
    drift = measured.drift_to(measured.rerun(restored))
    if drift.error > exact_bound(before):
        raise VerificationError(
            f"the pass changed more than weights and roundings: with those undone, {drift.output} differs by "
            f"{drift.error:.1e} (relative), more than rounding allows ({exact_bound(before):.0e})"
        )
    _check_roundings(after, by, reference.batches[0], measure.clips)


def _restore_biases(before: Program, restored: Program, sites: Collection[str]) -> None:
    """Put back the biases of the linears with these sites, in place."""
    for linear in linears(before.graph):
        weight, bias = weight_of(before, linear), argument(linear, "bias")
        if (
            weight is not None
            and weight.site in sites
            and isinstance(bias, fx.Node)
            and bias.op == "get_attr"
        ):
            name = str(bias.target)
            restored.parameters[name] = before.parameters[name]


def replaced_weights(after: Program, by: str) -> list[Replaced]:
    """The sites whose weights the pass `by` replaced, each with the node that stands for its weight."""
    return [
        (str(node.meta["site"]), node)
        for node in after.graph.nodes
        if node.meta.get("pass") == by and has_role(node, NodeRole.WEIGHT) and node.meta.get("site")
    ]


def check_sites(before: Program, after: Program, by: str, measure: Measure | None) -> str:
    """Verify the pass `by` without running a program; returns what was checked, in words.

    The weights that it replaced must be within the bound of `measure`, if that needs no outputs. Raises VerificationError,
    which names the site.
    """
    if measure is None or measure.needs_batches:
        return f"not compared: {NO_ROOM}"
    replaced = replaced_weights(after, by)
    measure.check(before, after, replaced, ())
    return f"{len(replaced)} replaced weights alone: {NO_ROOM}"


def unrounded(program: Program) -> Program:
    """A copy of the program without rounding of activations."""
    copy = program.clone()
    for node in [node for graph in copy.graphs.values() for node in graph.nodes]:
        if traits_of(node).kind is Kind.ROUNDING:
            node.replace_all_uses_with(node.args[0])
            node.graph.erase_node(node)
    return copy


def _check_roundings(program: Program, by: str, batch: Batch, clips: bool) -> None:
    """Run the program and check every rounding that the pass added, each as soon as it is computed.

    Where it `clips`, values count as the nearest ones that codes cover.
    """
    nodes = {
        node.name: node
        for node in program.graph.nodes
        if traits_of(node).kind is Kind.ROUNDING and node.meta.get("pass") == by
    }
    source_of = {name: in_eval(node.args[0]).name for name, node in nodes.items()}
    sources = set(source_of.values())
    wanted = set(nodes) | sources
    unrounded: dict[str, torch.Tensor] = {}
    readers: dict[str, int] = {}
    for source in source_of.values():
        readers[source] = readers.get(source, 0) + 1

    def visit(name: str, value: torch.Tensor) -> None:
        if name in sources:
            unrounded[name] = value
        if name in nodes:
            source = source_of[name]
            x = unrounded[source]
            _check_rounding(program, nodes[name], _covered(program, nodes[name], x) if clips else x, value)
            readers[source] -= 1
            if not readers[source]:
                unrounded.pop(source)

    known = {spec.name for spec in program.inputs}
    Observed(program).run({k: v for k, v in batch.items() if k in known}, wanted, visit)


def _check_rounding(program: Program, node: fx.Node, x: torch.Tensor, rounded: torch.Tensor) -> None:
    """Raise VerificationError if a rounded activation is farther from `x` than half a rounding step explains."""
    rms = float(x.double().square().mean().sqrt())
    if rms == 0:
        return
    allowed = 0.5 * _step(program, node, x) / rms + 0.03
    error = relative_error(rounded, x)
    if error > allowed:
        site = node.meta.get("site", node.name)
        raise VerificationError(
            f"{site}: rounding changed its activation by {error:.2f} (relative), more than its step allows ({allowed:.2f})"
        )


def _covered(program: Program, node: fx.Node, x: torch.Tensor) -> torch.Tensor:
    """The values of `x` clipped to what the codes of a static rounding cover; those of another stay."""
    if not traits_of(node).step:
        return x
    given = [
        program.tensor(str(item.target)) if isinstance(item, fx.Node) else item for item in node.args[1:]
    ]
    ends = x.new_tensor([-FARTHEST, FARTHEST])
    low, high = node.target(ends, *given)  # type: ignore[operator]
    return torch.clamp(x, low, high)


def _widest(program: Program, given: object) -> float:
    """The largest distance of neighbouring codes, which have the dtype of an argument: 1 for integers."""
    dtype = program.tensor(str(given.target)).dtype if isinstance(given, fx.Node) else torch.int8
    if not dtype.is_floating_point:
        return 1.0
    limits = torch.finfo(dtype)
    return float(limits.eps * 2 ** math.floor(math.log2(limits.max)))


def _step(program: Program, node: fx.Node, x: torch.Tensor) -> float:
    """The step by which a call rounds `x`, at most; raises VerificationError where its operator's row does not say it."""
    row = traits_of(node)
    if row.step:
        given = argument(node, row.step)
        step = float(program.tensor(str(given.target)) if isinstance(given, fx.Node) else given)
        return step * _widest(program, argument(node, row.codes) if row.codes else None)
    if row.levels and row.dims is Dims.RANGE:
        return float(x.max().clamp(min=0) - x.min().clamp(max=0)) / row.levels
    if row.levels and row.dims is Dims.BLOCKS:  # no block has a larger step than the largest value gives
        return float(x.abs().max()) / row.levels
    raise VerificationError(
        f"{node.meta.get('site', node.name)}: {node.target} rounds, but its row does not say by how much: give Traits.step, the "
        "name of the argument that is the step"
    )
