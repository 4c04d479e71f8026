"""Merge: fold deltas into the weights of their linears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.site_filter import matches, resolve_patterns
from bmgraph.analysis.structure.value_origins import stem
from bmgraph.analysis.weight_ranges import region_of
from bmgraph.analysis.weight_sites import Weight, site_path, weight_of
from bmgraph.deltas.low_rank import Delta, backbone_of, bound_deltas_of, deltas_of
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import adds_delta
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import calls, traits_of
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.utils.digest import fingerprint

aten = torch.ops.aten

CODES = (
    "its weight is int8 codes, and the sum would have to be rounded to codes again: merge before quantizing"
)
MASKED = "its weight is masked, and the sum would fill the pattern's zeros: keep the delta unmerged"


@dataclass(frozen=True, repr=False)
class Merge(ModelPass):
    """Fold each delta into its weight, `W + alpha / r * B A`, so that it costs nothing at inference.

    targets: globs over module paths. Where a weight has other uses (an embedding tied to the head; a layer used twice,
    of which one use has the delta), the uses with the delta get a separate copy of the weight, under the tied name
    where the model has one. A frozen weight stays frozen.

    Declined, with the reason: weights in int8 codes (not exact), masked weights (the zeros would fill), deltas chosen
    per row, deltas on experts.
    Raises PassError where no delta can be folded or a glob matches no delta.

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.passes import LoRA, Merge
        >>> program = bg.capture(torch.nn.Linear(6, 4), (torch.randn(3, 6),))
        >>> merged = bg.Pipeline([LoRA(r=2, targets=("*",)), Merge()]).run(program)
        >>> sorted(merged.parameters)
        ['bias', 'weight']
    """

    effect: ClassVar[Effect] = "exact"
    changes: ClassVar[frozenset[str]] = frozenset({"frozen", "ties"})
    requires: ClassVar[frozenset[str]] = frozenset({"delta"})

    targets: tuple[str, ...] = ("*",)

    def run(self, program: Program, context: Context) -> Program:
        """Fold the deltas of every graph."""
        graphs = program.graphs.values()
        sites = [delta.site for graph in graphs for delta in deltas_of(graph)]
        sites += [site for graph in graphs for site in bound_deltas_of(graph)]
        targets = resolve_patterns(self.targets, sites, "targets")
        for graph in program.graphs:
            with program.edit(graph, by=str(self)) as editor:
                for site, deltas in _by_site(editor.graph).items():
                    if not matches(site, targets):
                        continue
                    reason = _reason_to_decline(program, deltas)
                    if reason:
                        context.declined(site, reason)
                    else:
                        _fold(editor, site, deltas, context)
                for site, bound in bound_deltas_of(editor.graph).items():
                    if matches(site, targets):
                        context.declined(site, f"its delta is for {bound}")
        if not any(adds_delta(node) for graph in graphs for node in graph.nodes):
            # nothing of the delta is left beside the model: what trained whole with it belongs to the model now
            program.frozen |= program.trained_whole & set(program.parameters)
            program.trained_whole = frozenset()
        # Deltas that are trained from here on belong to the merged weights.
        program.fingerprint = fingerprint(backbone_of(program))
        return program


def _by_site(graph: fx.Graph) -> dict[str, dict[fx.Node, list[Delta]]]:
    """The deltas of each site, by the linear that they are attached to."""
    found: dict[str, dict[fx.Node, list[Delta]]] = {}
    for delta in deltas_of(graph):
        found.setdefault(delta.site, {}).setdefault(delta.linear, []).append(delta)
    return found


def _reason_to_decline(program: Program, uses: dict[fx.Node, list[Delta]]) -> str:
    """Why the deltas of a site cannot be folded; empty where they can."""
    for linear, deltas in uses.items():
        weight = weight_of(program, linear)
        if weight is None:
            return "its weight is computed from an input, or differs between training and evaluation"
        if weight.node.op != "get_attr" and region_of(program, weight.node) is None:
            return _reason_of(weight.node)
        inputs, expected = (
            weight.node.meta["val"].shape[1 - weight.channel_axis],
            deltas[0].a.meta["val"].shape[-1],
        )
        if inputs != expected:
            return f"its weight has {inputs} inputs and the delta {expected}, since SplitOutliers copied channels: merge before it"
    return ""


def _reason_of(weight: fx.Node) -> str:
    """Why a delta is not folded into a weight that is an expression, by its last operator."""
    if calls(weight, torch.ops.bmgraph.dequantize):
        return CODES
    masks = [item for item in weight.all_input_nodes if item.meta["val"].dtype == torch.bool]
    if traits_of(weight).kind is Kind.SCALING and masks:
        return MASKED
    return f"its weight is an expression, {stem(weight)}"


def _fold(editor: Editor, site: str, uses: dict[fx.Node, list[Delta]], context: Context) -> None:
    """Fold the deltas of a site: in place where all uses share them, else into one new weight for each set of deltas."""
    groups: dict[tuple[tuple[fx.Node, fx.Node, float], ...], list[fx.Node]] = {}
    for linear, deltas in uses.items():
        key = tuple(sorted(((item.a, item.b, item.scale) for item in deltas), key=lambda item: item[0].name))
        groups.setdefault(key, []).append(linear)
    in_place = len(groups) == 1 and not _other_readers(editor, list(uses))
    for group in groups.values():
        merged = _merged(editor.program, group[0], uses[group[0]])
        if in_place:
            _assign(editor, group[0], merged)
            context.edited(site, "folded in", [_tensor_of(editor.program, group[0])])
        else:
            name = _new_name(editor, site, group)
            frozen = _tensor_of(editor.program, group[0]) in editor.program.frozen
            reader = editor.parameter(name, merged, like=group[0], frozen=frozen)
            for linear in group:
                _set_weight(editor, linear, reader)
            context.edited(site, f"folded into a separate weight, {name}: the other uses keep the old one")
    for deltas in uses.values():
        for delta in deltas:
            delta.total.replace_all_uses_with(delta.total.args[0])  # type: ignore[arg-type]


def _stored(program: Program, linear: fx.Node) -> fx.Node:
    """The node that gives the weight of a linear as stored."""
    weight = weight_of(program, linear)
    assert isinstance(weight, Weight)
    return weight.node


def _tensor_of(program: Program, linear: fx.Node) -> str:
    """The parameter that holds the weight of a linear, which may be a part of it."""
    found = region_of(program, _stored(program, linear))
    return str(found[0].target if found else _stored(program, linear).target)


def _assign(editor: Editor, linear: fx.Node, merged: torch.Tensor) -> None:
    """Replace the weight of a linear, or its part of a parameter."""
    found = region_of(editor.program, _stored(editor.program, linear))
    name = _tensor_of(editor.program, linear)
    if found is not None:
        whole = editor.program.tensor(name).clone()
        found[1].of(whole).copy_(merged)
        merged = whole
    editor.assign(name, merged)


def _other_readers(editor: Editor, uses: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes of any graph that read the weight of `uses`, or a part that overlaps it, except the linears `uses`."""
    program = editor.program
    name, mine = _tensor_of(program, uses[0]), region_of(program, _stored(program, uses[0]))
    readers: list[fx.Node] = []
    for graph in program.graphs.values():
        waiting = [node for node in graph.nodes if node.op == "get_attr" and node.target == name]
        while waiting:
            for user in waiting.pop().users:
                part = region_of(program, user)
                if mine and part and not mine[1].overlaps(part[1]):
                    continue
                if part is not None or user.target is aten.t.default:
                    waiting.append(user)
                elif user not in uses:
                    readers.append(user)
    return readers


def _merged(program: Program, linear: fx.Node, deltas: Sequence[Delta]) -> torch.Tensor:
    """The merged weight of a linear, in its stored layout and dtype; the sum is computed in at least float32."""
    weight = weight_of(program, linear)
    assert isinstance(weight, Weight)
    stored = evaluate(program, weight.node)
    total = stored.to(torch.promote_types(stored.dtype, torch.float32))
    for delta in deltas:
        change = delta.change(program)
        total = total + (change.T if weight.transposed else change)
    return total.to(stored.dtype)


def _new_name(editor: Editor, site: str, group: Sequence[fx.Node]) -> str:
    """The name for the separate weight: the tied name that the model has for these uses, which is untied, else a new one."""
    scopes = {str(linear.meta.get("scope")) for linear in group}
    for alias, name in list(editor.program.ties.items()):
        if name == site and {site_path(alias)} == scopes:
            del editor.program.ties[alias]
            return alias
    return editor.fresh(f"{site}_merged")


def _set_weight(editor: Editor, linear: fx.Node, reader: fx.Node) -> None:
    """Let a linear read another parameter, transposed where its weight was."""
    weight = linear.args[1]
    assert isinstance(weight, fx.Node)
    if weight.target is aten.t.default:
        linear.update_arg(1, editor.call(aten.t.default, reader, like=linear))
    else:
        linear.update_arg(1, reader)
