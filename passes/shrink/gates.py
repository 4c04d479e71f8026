"""Gates on neurons and heads: where they are, how they are attached, and the program with their values in its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.coupling.coupled_dims import NONE
from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.weight_sites import read_elsewhere, weight_of
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import NodeRole, has_role
from bmgraph.ir.program import Program
from bmgraph.ir.shape_inference import value
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of
from bmgraph.passes.shrink.sites import SpreadSite
from bmgraph.utils.hard_concrete import HIGH, LOW, OPEN, TEMPERATURE

aten = torch.ops.aten


@dataclass(frozen=True)
class Gated:
    """A value that gates scale: `node` is `source` times `gates`, which are broadcast; `site` is the output linear's parameter."""

    site: str
    node: fx.Node
    source: fx.Node
    gates: fx.Node


def gated_values(program: Program) -> list[Gated]:
    """All values that gates scale, in the order of the graph."""
    found = []
    for node in program.graph.nodes:
        if has_role(node, NodeRole.GATES) and node.target is aten.mul.Tensor and not _is_constant(node):
            source, gates = node.args
            found.append(Gated(str(node.meta["site"]), node, source, gates))
    return found


def _is_constant(node: fx.Node) -> bool:
    """Whether a product is within the expression of gates, not behind a value of the model."""
    source: Any = node.args[0]
    return source.op == "get_attr" or has_role(source, NodeRole.GATES)


def attach_gates(editor: Editor, site: SpreadSite) -> tuple[str, str]:
    """Let what reads the units of a site read them times gates, one for each; returns the names of their noise and log alpha."""
    reader = site.site.reader
    assert reader is not None
    source, axis = reader
    program, name, units = editor.program, site.site.name, site.site.count
    labels = site.spread.labels[reader]
    first = min(source.users)
    like: dict[str, Any] = {"like": first, "site": name, "part": NodeRole.GATES}
    noise, alpha, gates = new_gates(editor, units, like)
    if not torch.equal(labels, torch.arange(units)):
        places = editor.parameter(
            editor.fresh(f"{name}_gate_units"),
            labels.to(program.device),
            like=first,
            frozen=True,
            part=NodeRole.GATES,
        )
        gates = editor.call(aten.index_select.default, gates, 0, places, **like)
    if value(source).dtype != value(gates).dtype:
        gates = editor.call(aten.to.dtype, gates, value(source).dtype, **like)
    assert axis == value(source).dim() - 1
    editor.replace(source, editor.call(aten.mul.Tensor, source, gates, **like))
    return noise, alpha


def new_gates(editor: Editor, units: int, like: dict[str, Any]) -> tuple[str, str, fx.Node]:
    """Open gates f[units] of the site and with the role that `like` says: the names of their noise and log alpha, and their values."""
    first, role, device = like["like"], like["part"], editor.program.device
    noise, alpha = (editor.fresh(f"{like['site']}_{stem}") for stem in ("gate_noise", "log_alpha"))
    gates = editor.parameter(alpha, torch.full((units,), OPEN, device=device), like=first, part=role)
    drawn = editor.buffer(noise, torch.zeros(units, device=device), like=first, part=role)
    gates = editor.call(aten.add.Tensor, gates, drawn, **like)
    gates = editor.call(
        aten.sigmoid.default, editor.call(aten.div.Tensor, gates, TEMPERATURE, **like), **like
    )
    gates = editor.call(aten.add.Tensor, editor.call(aten.mul.Tensor, gates, HIGH - LOW, **like), LOW, **like)
    return noise, alpha, editor.call(aten.clamp.default, gates, 0.0, 1.0, **like)


def fold_gates(
    program: Program, by: str, wanted: Callable[[str], bool]
) -> tuple[dict[str, torch.Tensor], dict[str, list[str]]]:
    """Multiply the weights that read gated values by the gates' deterministic values, in place, and remove the gates.

    Returns, by site, the gate of each feature f[features], and the tensors that changed. Where what reads the value has no plain
    weight (codes, a rounded input), a constant product is left in front of it.
    """
    values: dict[str, torch.Tensor] = {}
    changed: dict[str, list[str]] = {}
    with program.edit(by=by) as editor:
        for item in gated_values(program):
            if not wanted(item.site):
                continue
            gate = evaluate(program, item.gates)
            values[item.site] = gate.float()
            changed[item.site] = []
            if bool((gate == 1).all()):
                editor.replace(item.node, item.source)
                continue
            names = _plain_readers(program, item.node)
            if names is None:
                kept = editor.parameter(
                    editor.fresh(f"{item.site}_gates"), gate, like=item.node, frozen=True, part=NodeRole.GATES
                )
                item.node.update_arg(1, kept)
                item.node.meta.pop("part")
                continue
            for name, transposed in names:
                weight = program.parameters[name]
                program.parameters[name] = weight * (gate[:, None] if transposed else gate).to(weight.dtype)
            changed[item.site] = [name for name, _ in names]
            editor.replace(item.node, item.source)
    return values, changed


def _plain_readers(program: Program, node: fx.Node) -> list[tuple[str, bool]] | None:
    """The parameters of the linears that read a value, with whether they are stored [in, out]; None if something else reads it, or
    something else reads such a parameter."""
    found = []
    for user in node.users:
        weight = (
            weight_of(program, user) if traits_of(user).kind is Kind.LINEAR and user.args[0] is node else None
        )
        name = None if weight is None else program.ties.get(str(weight.node.target), str(weight.node.target))
        if (
            weight is None
            or name not in program.parameters
            or weight.node.op != "get_attr"
            or len(weight.node.users) > 1
            or read_elsewhere(weight)
            or value(weight.node).dim() != 2
        ):
            return None
        found.append((name, weight.transposed))
    return found


def closed_units(sites: Sequence[SpreadSite], values: dict[str, torch.Tensor]) -> Iterator[list[int]]:
    """For each site the units all of whose features have a gate of 0; one unit always stays."""
    for item in sites:
        reader, gates = item.site.reader, values[item.site.name].cpu()
        assert reader is not None
        labels = item.spread.labels[reader]
        units = [unit for unit in range(item.site.count) if bool((gates[labels == unit] == 0).all())]
        assert NONE not in units
        yield units[1:] if len(units) == item.site.count else units
