"""Quantizes tables of embeddings: rows that are looked up, which a tied head may multiply by as well."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.site_filter import matches
from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.weight_sites import Weight
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.passes.quantize.mse import ScaleRule
from bmgraph.passes.quantize.weight_format import WeightFormat

aten = torch.ops.aten


def embedding_sites(program: Program) -> list[str]:
    """The names of all tables that are looked up."""
    return [embedding.name for embedding in find(program).embeddings]


def quantize_lookups(
    program: Program,
    context: Context,
    form: WeightFormat,
    include: Sequence[str],
    exclude: Sequence[str],
    smallest: int,
    what: str,
    by: str,
    rule: ScaleRule | None,
) -> None:
    """Let lookups in the chosen tables read codes, and report them. Other readers of a table keep it as it is."""
    nodes = {node.name: node for node in program.graph.nodes}
    with program.edit(by=by) as editor:
        for embedding in find(program).embeddings:
            site = embedding.name
            if not matches(site, include) or matches(site, exclude):
                continue
            lookups = [nodes[use.node] for use in embedding.uses if use.graph == program.entry]
            reason = _reason_to_decline(lookups, smallest)
            if reason:
                context.declined(site, reason)
                continue
            table: fx.Node = lookups[0].args[0]  # type: ignore[assignment]
            stored = form.encode(evaluate(program, table), 0, rule)
            made = form.place(editor, Weight(site, table, False), stored, min(lookups), f"{site}_rows")
            for lookup in lookups:
                lookup.update_arg(0, made)
            context.edited(site, what)


def _reason_to_decline(lookups: Sequence[fx.Node], smallest: int) -> str:
    """Why a table cannot be quantized; empty where it can."""
    tables = {lookup.args[0] for lookup in lookups}
    table = next(iter(tables), None)
    if any(lookup.target is not aten.embedding.default for lookup in lookups):
        return "it is indexed otherwise than by an embedding"
    if len(tables) != 1 or not isinstance(table, fx.Node) or table.op != "get_attr":
        return "its rows are computed"
    value = table.meta["val"]
    if not value.is_floating_point() or min(value.shape) < smallest:
        return f"its table is {value.dtype} of {' x '.join(map(str, value.shape))}, below smallest={smallest}"
    return ""
