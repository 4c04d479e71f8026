"""Merge: fold deltas into the weights of their linears."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from glob import escape
from typing import Any, ClassVar

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.site_filter import matches, resolve_patterns
from bmgraph.analysis.structure.value_origins import stem
from bmgraph.analysis.weight_ranges import region_of
from bmgraph.analysis.weight_sites import Weight, site_path, weight_of
from bmgraph.deltas.backbone import backbone_of
from bmgraph.deltas.family import Delta
from bmgraph.deltas.registry import deltas_of
from bmgraph.deltas.weighted_sum import Combination
from bmgraph.errors import InputError
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import is_delta
from bmgraph.ir.program import Program
from bmgraph.lowering.store_codes import TRAINED
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.passes.merge_codes import (
    CodeForm,
    PlainWeights,
    form_of,
    in_codes,
    reads_rounded,
    sites_in_codes,
)
from bmgraph.passes.weighted_delta import WeightedDelta, check_weights
from bmgraph.utils.digest import fingerprint

aten = torch.ops.aten

CODES = (
    "its weight is {} codes, and the changed weight would have to be rounded to codes again: merge before quantizing, or allow "
    "it with requantize={}"
)
ROUNDED_INPUT = "its input is rounded, and merged the delta would read what is rounded: merge before quantizing activations"
TRAINING = "its weight trains in codes, and the changed weight would be rounded to others: merge before QAT"
MASKED = "its weight is masked, and a changed weight may fill the pattern's zeros: keep the delta unmerged"


@dataclass(frozen=True, repr=False)
class Merge(ModelPass):
    """Fold each delta into the weight and bias of its linear, LoRA as `W + alpha / r * B A`, so that it costs nothing at
    inference.

    LoRA, DoRA, IA3, VeRA and biases that BitFit added are folded exactly, up to the rounding of the weight's dtype (sums are
    computed in at least fp32).

    targets: globs over module paths. Where a weight has other uses (an embedding tied to the head; a layer used twice,
    of which one use has the delta), the uses with the delta get a separate copy of the weight, under the tied name
    where the model has one. A frozen weight stays frozen.

    weights: saved deltas that are added up and folded too, as `{"trec": 0.7, "spam": 0.3}` with the folders as resources;
    combination, rank: how, as in `WeightedDelta`. requantize: the largest relative error (L2) of a weight that may be rounded to
    codes again, at new scales; the report says the error of each, about 0.01 for int8, 0.1 for int4; 0, the default, rounds none.

    Declined, with the reason: weights in codes without requantize, or behind rounded inputs (not exact), masked weights
    (the zeros would fill), deltas chosen per row, deltas on experts, soft prompts, and families of deltas that change no weight.
    Raises PassError where no delta can be folded or a glob matches no delta, and what `WeightedDelta` raises.

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.passes import LoRA, Merge
        >>> program = bg.capture(torch.nn.Linear(6, 4), (torch.randn(3, 6),))
        >>> merged = bg.Pipeline([LoRA(r=2, targets=("*",)), Merge()]).run(program)
        >>> sorted(merged.parameters)
        ['bias', 'weight']
    """

    effect: ClassVar[Effect] = "exact"
    default_drift: ClassVar[float] = 0.1
    changes: ClassVar[frozenset[str]] = frozenset({"frozen", "ties"})
    requires: ClassVar[frozenset[str]] = frozenset({"delta"})

    other_names: ClassVar[Mapping[str, str]] = WeightedDelta.other_names

    targets: tuple[str, ...] = ("*",)
    weights: tuple[tuple[str, float], ...] = field(default=(), kw_only=True)
    combination: Combination = field(default="cat", kw_only=True)
    rank: int | None = field(default=None, kw_only=True)
    requantize: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights:
            check_weights(self.weights, self.combination, self.rank)
        elif self.rank is not None:
            raise InputError("rank is that of a weighted sum: give weights={'one': 0.7, 'other': 0.3} too")
        if not 0 <= self.requantize < 1:
            raise InputError(
                f"requantize={self.requantize}: give the largest relative error of a weight, such as 0.02"
            )

    @property
    def required(self) -> frozenset[str]:
        """A delta, unless it is loaded here."""
        return frozenset() if self.weights else self.requires

    @property
    def resources(self) -> tuple[str, ...]:
        """The adapter folders of a weighted sum."""
        return tuple(name for name, _ in self.weights)

    @property
    def promises(self) -> Effect:
        """Exact, unless weights are rounded again or deltas are loaded."""
        return "intended" if self.weights else "approximate" if self.requantize else "exact"

    @property
    def allowed_drift(self) -> float:
        """More than rounding weights to int8 again needs where they may move farther."""
        return max(self.default_drift, 5 * self.requantize)

    def run(self, program: Program, context: Context) -> Program:
        """Fold the deltas of every graph. What is exact of it is checked as such, also where options ask for more."""
        if self.weights:
            program = context.run(WeightedDelta(self.weights, self.combination, self.rank), program)
        found = [delta for graph in program.graphs.values() for delta in deltas_of(graph)]
        targets = resolve_patterns(self.targets, [delta.site for delta in found], "targets")
        if not (self.weights or self.requantize):
            return _fold_all(program, context, targets, str(self))
        reasons: dict[str, str] = {}
        if self.requantize:
            program, reasons = self._into_codes(program, context, targets)
        sites: dict[str, None] = {}
        for graph in program.graphs.values():
            for site, _, reason in _decided(program, deltas_of(graph), targets):
                if reason:
                    context.declined(site, reasons.get(site, reason))
                else:
                    sites[site] = None
        if sites:
            program = context.run(Merge(tuple(map(escape, sites))), program)
        for site in sites:
            context.edited(site, "folded in")
        return program

    def _into_codes(
        self, program: Program, context: Context, targets: Sequence[str]
    ) -> tuple[Program, dict[str, str]]:
        """Fold deltas into weights in codes, which are rounded again where that moves them by no more than allowed; returns also
        why others are not, by site."""
        chosen: dict[CodeForm, list[str]] = {}
        reasons: dict[str, str] = {}
        found = [item for graph in program.graphs.values() for item in sites_in_codes(program, graph)]
        count, forms = Counter(site for site, _ in found), dict(found)
        for graph in program.graphs.values():
            deltas = deltas_of(graph)
            for site, uses in _by_site(deltas).items():
                if site not in count or not matches(site, targets):
                    continue
                reason, error = _reason_to_decline(program, uses, deltas, codes=True), 0.0
                if site in program.parameters or len(uses) != count[site] or len(_groups(uses)) > 1:
                    reason = "its codes are also read without this delta: keep it unmerged"
                if not reason:
                    linear = next(iter(uses))
                    error = forms[site].error(program, linear, _merged(program, linear, uses[linear])[0])
                if error > self.requantize:
                    reason = f"rounded to codes again its weight would move by {error:.2g} (relative), more than {self.requantize:g}"
                if reason:
                    reasons[site] = reason
                else:
                    chosen.setdefault(forms[site], []).append(escape(site))
                    context.edited(
                        site,
                        f"folded into {forms[site].scheme} codes, which are {error:.2g} (relative) from the weight",
                    )
        for form, sites in chosen.items():
            for item in (PlainWeights(tuple(sites)), Merge(tuple(sites)), form.rounding(sites)):
                program = context.run(item, program)
        return program, reasons


def _fold_all(program: Program, context: Context, targets: Sequence[str], by: str) -> Program:
    """Fold the chosen deltas of every graph into weights."""
    for graph in program.graphs:
        with program.edit(graph, by=by) as editor:
            for site, uses, reason in _decided(program, deltas_of(editor.graph), targets):
                if reason:
                    context.declined(site, reason)
                else:
                    _fold(editor, site, uses, context)
    if not any(deltas_of(graph) for graph in program.graphs.values()):
        # nothing of the delta is left beside the model: what trained whole with it belongs to the model now
        for name in sorted(program.trained_whole):
            context.edited(name, "belongs to the model from here on")
            program.lr_factors.pop(name, None)
        program.frozen |= program.trained_whole & set(program.parameters)
        program.trained_whole = frozenset()
    # Deltas that are trained from here on belong to the merged weights.
    program.fingerprint = fingerprint(backbone_of(program))
    return program


def _decided(
    program: Program, deltas: Sequence[Delta], targets: Sequence[str]
) -> list[tuple[str, dict[fx.Node, list[Delta]], str]]:
    """The chosen sites of a graph's deltas, their deltas by linear, and why they cannot be folded, "" where they can."""
    found = [
        (site, uses, _reason_to_decline(program, uses, deltas))
        for site, uses in _by_site(deltas).items()
        if matches(site, targets)
    ]
    bound = {delta.site: delta.bound for delta in deltas if delta.bound}
    return [
        *found,
        *((site, {}, f"its delta is for {why}") for site, why in bound.items() if matches(site, targets)),
    ]


def _by_site(deltas: Sequence[Delta]) -> dict[str, dict[fx.Node, list[Delta]]]:
    """The deltas of each site that have a value of their own, by the linear that they are attached to."""
    found: dict[str, dict[fx.Node, list[Delta]]] = {}
    for delta in deltas:
        if not delta.bound:
            found.setdefault(delta.site, {}).setdefault(delta.linear, []).append(delta)
    return found


def _reason_to_decline(
    program: Program, uses: dict[fx.Node, list[Delta]], every: Sequence[Delta], codes: bool = False
) -> str:
    """Why the deltas of a site cannot be folded; empty where they can. `every`: all deltas of the graph; codes: whether codes may
    be rounded again."""
    for linear, deltas in uses.items():
        weight = weight_of(program, linear)
        if weight is None:
            return "its weight is computed from an input, or differs between training and evaluation"
        if codes and in_codes(weight):
            if reads_rounded(linear):
                return ROUNDED_INPUT
        elif weight.node.op != "get_attr" and region_of(program, weight.node) is None:
            return _reason_of(weight.node)
        for delta in deltas:
            reason = delta.family.why_not_folded(program, delta, weight)
            if reason:
                return reason
        kept = next((item for item in every if item.linear is linear and item.bound), None)
        if kept is not None and not all(item.family.adds for item in (kept, *deltas)):
            return f"another delta on it is for {kept.bound} and stays, and their order matters"
    return ""


def _reason_of(weight: fx.Node) -> str:
    """Why a delta is not folded into a weight that is an expression, by its last operator."""
    form = form_of(weight)
    if form is not None:
        return CODES.format(form.scheme, 0.02 if form.scheme == "int8" else 0.15)
    masks = [item for item in weight.all_input_nodes if item.meta["val"].dtype == torch.bool]
    if traits_of(weight).kind is Kind.SCALING and masks:
        return MASKED
    if weight.target in TRAINED:
        return TRAINING
    return f"its weight is an expression, {stem(weight)}"


def _fold(editor: Editor, site: str, uses: dict[fx.Node, list[Delta]], context: Context) -> None:
    """Fold the deltas of a site: in place where all uses share them, else into one new weight for each set of deltas."""
    groups = _groups(uses)
    in_place = len(groups) == 1 and not _other_readers(editor, list(uses))
    for group in groups:
        merged, bias = _merged(editor.program, group[0], uses[group[0]])
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
        if bias is not None:
            _set_bias(editor, site, group, bias, context)
    for deltas in uses.values():
        for delta in deltas:
            below: Any = delta.total.args[0]
            delta.total.replace_all_uses_with(below)


def _groups(uses: dict[fx.Node, list[Delta]]) -> list[list[fx.Node]]:
    """The linears of a site, those with the same deltas together."""
    groups: dict[tuple[tuple[object, ...], ...], list[fx.Node]] = {}
    for linear, deltas in uses.items():
        keys = [item.key for item in deltas]
        if all(item.family.adds for item in deltas):
            keys.sort(key=str)
        groups.setdefault(tuple(keys), []).append(linear)
    return list(groups.values())


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
                if is_delta(user):  # what it makes of the weight is folded in
                    continue
                if mine and part and not mine[1].overlaps(part[1]):
                    continue
                if part is not None or user.target is aten.t.default:
                    waiting.append(user)
                elif user not in uses:
                    readers.append(user)
    return readers


def _merged(
    program: Program, linear: fx.Node, deltas: Sequence[Delta]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The merged weight of a linear, in its stored layout and dtype, and its bias where that changes, else None.

    Sums are computed in at least float32; of several deltas the innermost is folded first.
    """
    weight = weight_of(program, linear)
    assert isinstance(weight, Weight)
    stored = evaluate(program, weight.node)
    wide = torch.promote_types(stored.dtype, torch.float32)
    expression: Any = linear.args[2] if len(linear.args) > 2 else None
    before = None if expression is None else evaluate(program, expression)
    total = stored.to(wide).T if weight.transposed else stored.to(wide)
    old = bias = None if before is None else before.to(wide)
    for delta in deltas:
        total, bias = delta.family.folded(delta.change(program), total, bias)
    total = (total.T if weight.transposed else total).to(stored.dtype).contiguous()
    return total, None if bias is old or bias is None else bias.to(stored.dtype)


def _set_bias(
    editor: Editor, site: str, group: Sequence[fx.Node], bias: torch.Tensor, context: Context
) -> None:
    """Let linears add another bias: in place where nothing else reads theirs, else under a name of its own."""
    old: Any = group[0].args[2] if len(group[0].args) > 2 else None
    named = isinstance(old, fx.Node) and old.op == "get_attr"
    graphs = editor.program.graphs.values()
    readers = [
        user
        for graph in graphs
        for node in graph.nodes
        if named and node.op == "get_attr" and node.target == old.target
        for user in node.users
    ]
    if named and set(readers) <= set(group):
        editor.assign(str(old.target), bias)
        context.edited(str(old.target), "folded in")
        return
    name = editor.fresh(f"{site_path(site)}.bias_merged")
    frozen = not named or old.target in editor.program.frozen
    reader = editor.parameter(name, bias, like=group[0], frozen=frozen)
    for linear in group:
        linear.args = (*linear.args[:2], reader)
    context.edited(site, f"with a bias of its own, {name}")


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
