"""The check of a pass that says it only replaces weights and rounds activations: all else must be as it was."""

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

ROUNDINGS = frozenset(
    {
        torch.ops.bmgraph.quantize_static.default,
        torch.ops.bmgraph.quantize_dynamic.default,
        torch.ops.bmgraph.quantize_blocks.default,
    }
)
"""Operators that round their first argument."""


def check_skeleton(before: Program, after: Program, by: str, reference: Reference, bound: float) -> None:
    """For a pass that only replaces weights and rounds activations: everything else is as it was.

    With the weights of before put back and the rounding taken out, the program must compute what it did; each new
    weight must be near its old one (`bound`, relative, in each row and column of the scaled axis); each rounded
    activation must be near what it rounds. Raises VerificationError naming the site.
    """
    twin = after.clone()
    for node in list(twin.graph.nodes):
        if node.meta.get("pass") != by:
            continue
        if node.target in ROUNDINGS:
            node.replace_all_uses_with(node.args[0])
        elif node.meta.get("part") == "weight" and node.meta.get("site"):
            site = str(node.meta["site"])
            old = weight_value(before, site)
            _check_weight(site, evaluate(after, _same_node(after.graph, node)), old, bound)
            with twin.graph.inserting_before(node):
                reader = twin.graph.get_attr(f"twin.{site}")
            twin.parameters[f"twin.{site}"] = old
            node.replace_all_uses_with(reader)
    twin.graph.eliminate_dead_code()
    moved = reference.drift_to(reference.again(twin))
    if moved.error > exact_bound(before):
        raise VerificationError(
            f"beside its weights and roundings the pass changed what is computed: with them undone, {moved.output} moves "
            f"by {moved.error:.1e}, more than rounding ({exact_bound(before):.0e})"
        )
    _check_roundings(after, by, reference.batches[0])


def _same_node(graph: fx.Graph, node: fx.Node) -> fx.Node:
    found: fx.Node = next(item for item in graph.nodes if item.name == node.name)
    return found


def weight_value(program: Program, site: str) -> torch.Tensor:
    """The matrix that a site multiplies with, whatever expression it has become."""
    last = None
    for node in program.graph.nodes:
        if node.meta.get("site") == site and node.meta.get("part") == "weight":
            last = node
    return evaluate(program, last) if last is not None else program.tensor(site)


def _check_weight(site: str, new: torch.Tensor, old: torch.Tensor, bound: float) -> None:
    if new.shape != old.shape:
        raise VerificationError(f"{site}: its weight was {list(old.shape)} and became {list(new.shape)}")
    if relative_error(new, old) > bound:
        raise VerificationError(
            f"{site}: its weight moved by {relative_error(new, old):.2f} (relative), more than {bound:g}"
        )
    if new.dim() != 2:
        return
    scale = old.abs().amax(1) if _rows_scaled(new, old) else old.abs().amax(0)
    axis = 1 if _rows_scaled(new, old) else 0
    moved = (new - old).double().norm(dim=axis) / old.double().norm(dim=axis).clamp(min=1e-30)
    moved = torch.where(scale > 0, moved, torch.zeros_like(moved))
    if float(moved.max()) > bound:
        raise VerificationError(
            f"{site}: channel {int(moved.argmax())} of its weight moved by {float(moved.max()):.2f} (relative), more than {bound:g}"
        )


def _rows_scaled(new: torch.Tensor, old: torch.Tensor) -> bool:
    """Whether the error is spread more evenly over rows than over columns: the axis that carries the scales."""
    error = (new - old).double()
    rows = error.norm(dim=1) / old.double().norm(dim=1).clamp(min=1e-30)
    columns = error.norm(dim=0) / old.double().norm(dim=0).clamp(min=1e-30)
    return float(rows.max()) <= float(columns.max())


def _check_roundings(program: Program, by: str, batch: Batch) -> None:
    nodes = {
        node.name: node
        for node in program.graph.nodes
        if node.target in ROUNDINGS and node.meta.get("pass") == by
    }
    source_of = {name: in_eval(node.args[0]).name for name, node in nodes.items()}
    sources = set(source_of.values())
    wanted = set(nodes) | sources
    seen: dict[str, torch.Tensor] = {}
    readers: dict[str, int] = {}
    for source in source_of.values():
        readers[source] = readers.get(source, 0) + 1

    def visit(name: str, value: torch.Tensor) -> None:
        if name in sources:
            seen[name] = value
        if name in nodes:
            source = source_of[name]
            _check_rounding(program, nodes[name], seen[source], value)
            readers[source] -= 1
            if not readers[source]:
                seen.pop(source)

    known = {spec.name for spec in program.inputs}
    Observed(program).run({k: v for k, v in batch.items() if k in known}, wanted, visit)


def _check_rounding(program: Program, node: fx.Node, x: torch.Tensor, rounded: torch.Tensor) -> None:
    rms = float(x.double().square().mean().sqrt())
    if rms == 0:
        return
    step = node.args[1] if len(node.args) > 1 else None
    if isinstance(step, fx.Node):
        scale = float(program.tensor(str(step.target)))
    elif isinstance(step, int):  # blocks of so many values, none wider than the widest
        scale = float(x.abs().max()) / 127
    else:
        scale = float(x.max().clamp(min=0) - x.min().clamp(max=0)) / 255
    allowed = 0.5 * scale / rms + 0.03
    error = relative_error(rounded, x)
    if error > allowed:
        site = node.meta.get("site", node.name)
        raise VerificationError(
            f"{site}: rounding its activation moved it by {error:.2f} (relative), more than its step allows ({allowed:.2f})"
        )
