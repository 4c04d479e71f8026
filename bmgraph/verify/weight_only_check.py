"""Verifies passes that claim to replace only weights and to round only activations."""

from __future__ import annotations

import torch
from torch import fx

import bmgraph.ops  # noqa: F401  (registers the operators of quantised programs)
from bmgraph.analysis.interpreter import Observed, evaluate
from bmgraph.errors import VerificationError
from bmgraph.ir.eval_form import in_eval
from bmgraph.ir.program import Program
from bmgraph.verify.metrics import relative_error
from bmgraph.verify.reference_outputs import Batch, Reference, exact_bound

HALF_STEP_SLACK = 1e-2
"""How far beyond half a scale a code may be, in scales, beside the rounding of the scales' own type."""

LEAST_USED = 0.95
"""The share of the codes' range that the largest weight of a channel must use."""

ROUNDINGS = frozenset(
    {
        torch.ops.bmgraph.quantize_static.default,
        torch.ops.bmgraph.quantize_dynamic.default,
        torch.ops.bmgraph.quantize_blocks.default,
    }
)
"""Operators that round their first argument to fewer bits."""


def check_weight_only(before: Program, after: Program, by: str, reference: Reference, bound: float) -> None:
    """Verify the pass `by`: only weights and roundings differ between `before` and `after`.

    With the old weights restored and the roundings removed, `after` must reproduce the outputs of `reference`. Each new
    weight must be within `bound` (relative error) of the old one, as a whole and per channel along the scaled axis. Each
    rounded activation must be close to its unrounded value. Raises VerificationError, which names the site.
    """
    restored = after.clone()
    for node in list(restored.graph.nodes):
        if node.meta.get("pass") != by:
            continue
        if node.target in ROUNDINGS:
            node.replace_all_uses_with(node.args[0])
        elif node.meta.get("part") == "weight" and node.meta.get("site"):
            site = str(node.meta["site"])
            old = weight_value(before, site)
            same = _same_node(after.graph, node)
            _check_weight(site, evaluate(after, same), old, bound, _scaled_axis(node))
            if node.target is torch.ops.bmgraph.dequantize.default:
                _check_codes(after, site, same, old)
            with restored.graph.inserting_before(node):
                reader = restored.graph.get_attr(f"restored.{site}")
            restored.parameters[f"restored.{site}"] = old
            node.replace_all_uses_with(reader)
    restored.graph.eliminate_dead_code()
    drift = reference.drift_to(reference.rerun(restored))
    if drift.error > exact_bound(before):
        raise VerificationError(
            f"the pass changed more than weights and roundings: with those undone, {drift.output} differs by "
            f"{drift.error:.1e} (relative), more than rounding allows ({exact_bound(before):.0e})"
        )
    _check_roundings(after, by, reference.batches[0])


def unrounded(program: Program) -> Program:
    """A copy of the program without rounding of activations."""
    copy = program.clone()
    for node in list(copy.graph.nodes):
        if node.target in ROUNDINGS:
            node.replace_all_uses_with(node.args[0])
            copy.graph.erase_node(node)
    return copy


def _same_node(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The node of the same name in another graph."""
    found: fx.Node = next(item for item in graph.nodes if item.name == node.name)
    return found


def weight_value(program: Program, site: str) -> torch.Tensor:
    """The current weight matrix of a site, behind any expression that passes put around it."""
    outermost = None
    for node in program.graph.nodes:
        if node.meta.get("site") == site and node.meta.get("part") == "weight":
            outermost = node
    return evaluate(program, outermost) if outermost is not None else program.tensor(site)


def _check_codes(program: Program, site: str, node: fx.Node, old: torch.Tensor) -> None:
    """Raise VerificationError unless codes are the nearest to the old weight, at scales that its largest values fill.

    Where a pass clips values on purpose, or shifts codes by what it measured, it must not call itself rounding.
    """
    codes, scale = (evaluate(program, item) for item in node.args[:2])  # type: ignore[arg-type]
    axis = _scaled_axis(node)
    assert axis is not None
    reduced = 1 - axis if codes.dim() == 2 else 3 - axis
    step = scale.unsqueeze(reduced).double()
    error = (old.double() - step * codes.double()).abs()
    slack = HALF_STEP_SLACK + torch.iinfo(codes.dtype).max * torch.finfo(scale.dtype).eps
    if bool((error > (0.5 + slack) * step).any()):
        raise VerificationError(
            f"{site}: a code is {float((error / step).max()):.2f} scales away from its weight, more than half a scale"
        )
    largest = old.double().abs().amax(reduced, keepdim=True)
    used = torch.where(largest > 0, largest / step, float(torch.iinfo(codes.dtype).max))
    if float(used.min()) < LEAST_USED * torch.iinfo(codes.dtype).max:
        raise VerificationError(
            f"{site}: channel {int(used.argmin())} uses codes up to {float(used.min()):.1f} of "
            f"{torch.iinfo(codes.dtype).max}: its scale is too large"
        )


def _scaled_axis(node: fx.Node) -> int | None:
    """The axis of a weight along which each channel has a scale of its own; None if its expression does not tell."""
    if node.target is not torch.ops.bmgraph.dequantize.default or len(node.args) < 3:
        return None
    axis = node.args[2]
    assert isinstance(axis, int)
    return axis


def _check_weight(site: str, new: torch.Tensor, old: torch.Tensor, bound: float, axis: int | None) -> None:
    """Raise VerificationError if a weight, or one of its channels along `axis`, changed by more than `bound`.

    A channel of zeros must stay zero. Where `axis` is None, it is the one whose channels changed less.
    """
    if new.shape != old.shape:
        raise VerificationError(
            f"{site}: the shape of its weight changed from {list(old.shape)} to {list(new.shape)}"
        )
    if relative_error(new, old) > bound:
        raise VerificationError(
            f"{site}: its weight changed by {relative_error(new, old):.2f} (relative), more than {bound:g}"
        )
    if new.dim() not in (2, 3):
        return
    if axis is not None:
        errors = _channel_errors(new, old, 1 - axis if new.dim() == 2 else 3 - axis)
    else:
        errors = min(
            (_channel_errors(new, old, dim) for dim in (-1, -2)), key=lambda found: float(found.max())
        )
    if not float(errors.max()) <= bound:
        raise VerificationError(
            f"{site}: channel {int(errors.argmax())} of its weight changed by {float(errors.max()):.2f} "
            f"(relative), more than {bound:g}"
        )


def _channel_errors(new: torch.Tensor, old: torch.Tensor, dim: int) -> torch.Tensor:
    """The relative error of each channel, whose values lie along `dim`."""
    norms: torch.Tensor = (new - old).double().norm(dim=dim) / old.double().norm(dim=dim).clamp(min=1e-30)
    return norms


def _check_roundings(program: Program, by: str, batch: Batch) -> None:
    """Run the program and check every rounding that the pass added, each as soon as it is computed."""
    nodes = {
        node.name: node
        for node in program.graph.nodes
        if node.target in ROUNDINGS and node.meta.get("pass") == by
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
            _check_rounding(program, nodes[name], unrounded[source], value)
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
    step = node.args[1] if len(node.args) > 1 else None
    if isinstance(step, fx.Node):
        scale = float(program.tensor(str(step.target)))
    elif isinstance(step, int):  # quantize_blocks: no block has a larger step than the largest value gives
        scale = float(x.abs().max()) / 127
    else:
        scale = float(x.max().clamp(min=0) - x.min().clamp(max=0)) / 255
    allowed = 0.5 * scale / rms + 0.03
    error = relative_error(rounded, x)
    if error > allowed:
        site = node.meta.get("site", node.name)
        raise VerificationError(
            f"{site}: rounding changed its activation by {error:.2f} (relative), more than its step allows ({allowed:.2f})"
        )
