"""Families whose deltas sit on linears: what they have in common; each says its own form in the graph."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, ClassVar

import torch
from torch import fx

from bmgraph.analysis.interpreter import reads_no_input
from bmgraph.analysis.structure.sites import Linear
from bmgraph.analysis.weight_sites import Weight
from bmgraph.deltas.backbone import freeze_backbone
from bmgraph.deltas.changed_weights import ChangeAt, with_changes
from bmgraph.deltas.delta_calls import DeltaCalls, changed_linear, delta_input
from bmgraph.deltas.family import Change, Delta, DeltaFamily, Part, Room
from bmgraph.deltas.forms import FormCalls, Hole, bound, settings, subsets
from bmgraph.deltas.module_matching import Sizes, match_modules, module_name
from bmgraph.deltas.registry import families
from bmgraph.deltas.row_choice import attach_stacks
from bmgraph.deltas.weighted_sum import Combination, Weighted
from bmgraph.errors import InputError, MisplacedError, PassError
from bmgraph.ir.editor import Editor, unused_name
from bmgraph.ir.node_role import ends_delta, is_delta, role_of
from bmgraph.ir.pass_record import Edit
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of

aten = torch.ops.aten

ROWS = "rows"
"""The key of a tensor bool[out, 1] that says which outputs of its linear a delta changes."""

BY_EXPERTS = "experts that each token chooses"
BY_ROWS = "rows that choose their own"


class LinearFamily(DeltaFamily):
    """A family whose deltas change the output of linears. A subclass says its form in the graph and its arithmetic."""

    keys: ClassVar[tuple[str, ...]]
    """Names of a delta's tensors, in the order of its parameters; each parameter's name ends with one."""
    axes: ClassVar[Mapping[str, int]] = {}
    """How many axes each tensor has, by its key: files with another number are refused."""
    numbers: ClassVar[tuple[str, ...]] = ()
    """Names of a delta's numbers: files with others, or without one, are refused."""
    optional: ClassVar[tuple[str, ...]] = ()
    """The keys that a delta may be without."""
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """The options that `build` reads, with their values; a `Hole` of the option's name stands for any number."""
    exclusive: ClassVar[bool] = False
    """Whether a linear with such a delta takes no other."""
    folds: ClassVar[bool] = True
    """Whether a delta is a change of weight and bias (`folded`). If not, `applied` says what it computes, and it is not merged."""
    shared: ClassVar[tuple[str, ...]] = ()
    """The keys of tensors that all deltas of a program have together."""
    frozen: ClassVar[tuple[str, ...]] = ()
    """The keys of tensors that do not train."""
    alike: ClassVar[tuple[str, ...]] = ()
    """The options, and keys of tensors, that all deltas must have alike of which rows choose; such tensors are not stacked."""
    rank_axes: ClassVar[Mapping[str, int]] = {}
    """By key, the axis of a stacked tensor along which a delta may be smaller than the largest: that of ranks or widths."""

    @abstractmethod
    def build(
        self, call: DeltaCalls, tensors: Mapping[str, fx.Node], change: Change, options: Mapping[str, Any]
    ) -> fx.Node:
        """Add one delta after `call.linear` and return the node of its total (`call.end`); `tensors` read its parameters.

        A family without a `read` of its own reads of the model only what `call` has, since `build` says its form, too.
        """

    def read(self, total: fx.Node) -> Delta:
        """The delta that ends in a total with a role of the family, on a linear. Raises PassError where it has not the form
        that `build` gives it."""
        for keys, options in product(tuple(subsets(self.keys, self.optional)), tuple(settings(self.choices))):
            holes: Any = {key: Hole(key) for key in keys}
            numbers: Any = {name: Hole(name) for name in self.numbers}
            for with_bias in (True, False):
                calls: Any = FormCalls(with_bias)
                form: Any = self.build(calls, holes, Change({}, numbers), options)
                found = bound(form, total)
                if found is None or not _are_values(found, keys, self.numbers):
                    continue
                return Delta(
                    self,
                    str(total.meta["site"]),
                    changed_linear(total),
                    total,
                    tensors={key: found[key] for key in keys},
                    numbers={name: float(found[name]) for name in self.numbers},
                    options={name: found.get(name, value) for name, value in options.items()},
                )
        raise of_no_family(total, f"what the family {self.name!r} builds")

    def role_for(self, change: Change) -> str:
        """The role of the nodes of a new delta: the first, unless a family has several."""
        return self.roles[0]

    @abstractmethod
    def sizes(self, change: Change) -> Sizes:
        """Outputs and inputs of the linear that a change fits; None where any number does."""

    @abstractmethod
    def describe(self, change: Change) -> str:
        """A change, or several stacked ones, in a few words for the report: "rank 8"."""

    def stacked(self, changes: Mapping[int, Change], count: int) -> Change:
        """The changes of one linear, by number, as tensors whose first axis is the number, 0 to `count`.

        Numbers without a change, and 0, change nothing. Without it, rows cannot choose among deltas of the family.
        """
        raise PassError(f"rows cannot choose among deltas of the family {self.name!r}")

    def row_entry(self, change: Change) -> Mapping[str, torch.Tensor]:
        """The entry of one change in the stacks that `stacked` makes, as large as the change itself; views do."""
        return {key: stack[1] for key, stack in self.stacked({1: change}, 1).tensors.items()}

    def build_rows(self, call: DeltaCalls, x: fx.Node, chosen: Mapping[str, fx.Node]) -> fx.Node:
        """As `build`, with tensors that have one entry for each row of the linear's input `x`, but for those of `alike`;
        `call.options` are the options."""
        raise PassError(f"rows cannot choose among deltas of the family {self.name!r}")

    def options_of_rows(self, nodes: Iterable[fx.Node]) -> Mapping[str, Any]:
        """The options of `alike` that calls of `build_rows` were made with."""
        return {}

    def applied(
        self,
        change: Change,
        options: Mapping[str, Any],
        x: torch.Tensor,
        y: torch.Tensor,
        source: torch.Tensor | None,
    ) -> torch.Tensor:
        """What a linear with the delta gives, from its input x, its output y and the source: the formula, in plain torch.

        What `build` adds is compared with it.
        """
        raise PassError(f"the family {self.name!r} does not say what its deltas compute")

    def sources(self, program: Program) -> Mapping[str, fx.Node]:
        """For a family whose deltas read the input of another linear: that linear, by the name of the node of theirs."""
        return {}

    @property
    def reads_elsewhere(self) -> bool:
        """Whether its deltas read the input of another linear."""
        return type(self).sources is not LinearFamily.sources

    def shared_names(self, program: Program) -> dict[str, str]:
        """Unused names for the parameters that new deltas have together, by key."""
        return {key: unused_name(program.tensors(), f"{self.name}_{key}") for key in self.shared}

    def recognise(self, graph: fx.Graph) -> list[Delta]:
        """The deltas of the family in a graph: its own form on linears, and what depends on rows or experts besides."""
        found = []
        for total in graph.nodes:
            if ends_delta(total) and role_of(total) in self.roles:
                rests = _bound(total)
                site, linear = str(total.meta.get("site")), changed_linear(total)
                found.append(Delta(self, site, linear, total, rests) if rests else self.read(total))
        return found

    def check_fits(self, program: Program, part: Part) -> None:
        """Raise MisplacedError where a module is missing, or has another shape."""
        match_modules(program, part, self.sizes)

    def attach(self, program: Program, part: Part, by: str) -> list[Edit]:
        """Add the loaded deltas to every use of their modules."""
        added: list[tuple[Linear, NewDelta]] = []
        edits: list[Edit] = []
        stems: set[str] = set()
        shared = self.shared_names(program)
        for module, linear in match_modules(program, part, self.sizes).items():
            change = part.changes[module]
            stem = self.free_stem(program, linear.name, taken=stems)
            stems.add(stem)
            added.append((linear, NewDelta(self, linear.name, stem, change, part.options, shared)))
            edits.append(Edit(linear.name, f"{self.describe(change)} of {module}"))
        attach_all(program, added, by)
        return edits

    def changed(self, program: Program, part: Part) -> Program:
        """A copy whose linears multiply by the weights that the deltas make of theirs, or give what the family says."""
        changes = [
            ChangeAt(use.node, self, part.changes[module], part.options)
            for module, linear in match_modules(program, part, self.sizes).items()
            for use in linear.uses
        ]
        return with_changes(program, changes)

    def attach_rows(
        self,
        editor: Editor,
        selector: fx.Node,
        parts: Mapping[int, Part],
        names: tuple[str, ...],
        room: Room | None = None,
    ) -> list[Edit]:
        """Stack the deltas of each linear; each row takes the entry of its number. Refused where the family stacks none."""
        if type(self).stacked is LinearFamily.stacked:
            return super().attach_rows(editor, selector, parts, names, room)
        changes: dict[Linear, dict[int, Change]] = {}
        for number, part in parts.items():
            for module, linear in match_modules(editor.program, part, self.sizes).items():
                changes.setdefault(linear, {})[number] = part.changes[module]
        _check_together(editor.graph, {use.node: self for linear in changes for use in linear.uses})
        return attach_stacks(self, editor, selector, parts, names, changes, room or Room())

    def combined(
        self, program: Program, parts: Sequence[tuple[str, float, Part]], how: Combination, rank: int | None
    ) -> Part:
        """The sum of the changes of each module. Refused where the family adds up none."""
        if type(self).summed is LinearFamily.summed:
            return super().combined(program, parts, how, rank)
        by_module: dict[str, list[tuple[float, Change]]] = {}
        for _, weight, part in parts:
            for module, change in part.changes.items():
                by_module.setdefault(module, []).append((weight, change))
        path = parts[0][2].path.parent / "+".join(name for name, _, _ in parts)
        changes = {module: self.summed(found, how, rank, module) for module, found in by_module.items()}
        return Part(self, path, changes, parts[0][2].options)

    def summed(self, changes: Weighted, how: Combination, rank: int | None, module: str) -> Change:
        """The weighted sum of the changes of one module, as one change. Without it, deltas of the family are not added up."""
        raise PassError(f"there is no weighted sum of deltas of the family {self.name!r}")

    def why_not_folded(self, program: Program, delta: Delta, weight: Weight) -> str:
        """Empty, for a family that folds: a change of the output that the input does not decide is one of weight and bias."""
        return "" if self.folds else super().why_not_folded(program, delta, weight)

    def free_stem(self, program: Program, site: str, label: str = "", taken: Container[str] = ()) -> str:
        """An unused prefix for the parameter names of a new delta, which is not in `taken` either.

        `label` distinguishes deltas on parts of one linear.
        """
        prefix = f"{site}_{label}_{self.name}" if label else f"{site}_{self.name}"
        names = program.tensors()
        count, free = 1, prefix
        while free in taken or any(f"{free}_{key}" in names for key in self.keys):
            count += 1
            free = f"{prefix}_{count}"
        return free

    def by_module(self, program: Program) -> dict[str, list[Delta]]:
        """Module -> its deltas of this family, for saving. A delta on several uses of a linear counts once.

        Raises InputError for a delta that a folder cannot hold: on experts or chosen by rows, on a parameter that is not
        the `weight` of a module, on some outputs of a linear.
        """
        found: dict[str, dict[tuple[Any, ...], Delta]] = {}
        deltas = [delta for graph in program.graphs.values() for delta in self.recognise(graph)]
        for delta in sorted(deltas, key=lambda delta: not delta.bound):
            if delta.bound:
                raise InputError(
                    f"the delta on {delta.site} cannot be saved: PEFT's format supports none for {delta.bound}; save the "
                    "whole program"
                )
            module = module_name(program, delta.site, delta.linear)
            if module is None:
                raise InputError(
                    f"the delta on {delta.site} cannot be saved: it is not the `weight` of a module, as PEFT's format "
                    "requires; save the whole program"
                )
            if ROWS in delta.tensors or any(node.op != "get_attr" for node in delta.tensors.values()):
                raise InputError(
                    f"the delta on {module} cannot be saved: PEFT's format supports no delta on some outputs of a linear "
                    f"(a role within a fused one); use targets=({module!r},), or save the whole program"
                )
            found.setdefault(module, {}).setdefault(delta.key, delta)
        return {module: list(deltas.values()) for module, deltas in found.items()}


@dataclass(frozen=True)
class NewDelta:
    """A delta to add to a linear. `stem` is the prefix of its parameters' names, which end with the keys of its change;
    `shared` are the names of those that it shares with others, by key.

    The parameters get the program's device and the linear's dtype.
    """

    family: LinearFamily
    site: str
    stem: str
    change: Change
    options: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)

    def attach(self, editor: Editor, linear: fx.Node, source: fx.Node | None = None) -> fx.Node:
        """Add the delta to one use of the linear, and its parameters at the first use. Returns the node of the total.

        `source`: the linear whose input it reads, for a family that has one.
        """
        read = None if source is None else delta_input(source)
        call = DeltaCalls(editor, linear, self.site, self.family.role_for(self.change), read)
        readers = {
            key: self._read(editor, linear, key, tensor) for key, tensor in self.change.tensors.items()
        }
        return self.family.build(call, readers, self.change, self.options)

    def _read(self, editor: Editor, linear: fx.Node, key: str, tensor: torch.Tensor) -> fx.Node:
        name = self.shared.get(key) or f"{self.stem}_{key}"
        if name in editor.program.parameters:
            return editor.read(name)
        dtype = linear.meta["val"].dtype if tensor.is_floating_point() else tensor.dtype
        value = tensor.to(device=editor.program.device, dtype=dtype)
        frozen, role = key in self.family.frozen, self.family.role_for(self.change)
        node = editor.parameter(name, value, like=linear, frozen=frozen, part=role)
        node.meta["site"] = self.site
        return node


def attach_all(program: Program, deltas: Iterable[tuple[Linear, NewDelta]], by: str) -> None:
    """Add each delta to every use of its linear, then freeze the backbone. `by` names the pass."""
    pairs = list(deltas)
    sources = {delta.family: delta.family.sources(program) for _, delta in pairs}
    for graph in program.graphs:
        new = {use.node: delta.family for linear, delta in pairs for use in linear.uses if use.graph == graph}
        _check_together(program.graphs[graph], new)
        with program.edit(graph, by=by) as editor:
            nodes = {node.name: node for node in editor.graph.nodes}
            for linear, delta in pairs:
                for use in linear.uses:
                    if use.graph == graph:
                        source = sources[delta.family].get(use.node)
                        if source is None and delta.family.reads_elsewhere:
                            raise MisplacedError(
                                f"{linear.name} takes no delta of the family {delta.family.name!r}: it does not end an attention or "
                                "a feed-forward, whose input the delta would read"
                            )
                        delta.attach(editor, nodes[use.node], source)
    freeze_backbone(program)


def of_no_family(total: fx.Node, expected: str) -> PassError:
    """The error for nodes that have the role of a delta and no known form; `expected` is the form."""
    return PassError(
        f"the delta on {total.meta.get('site') or total.name}, added by "
        f"{total.meta.get('pass') or 'an unknown pass'} at {total.name}, is of no family: its role "
        f"{role_of(total)!r} is for {expected}; give its nodes the role of a family of their own"
    )


def _are_values(found: Mapping[str, Any], keys: Iterable[str], numbers: Iterable[str]) -> bool:
    """Whether what stands for tensors are expressions of parameters, and what stands for numbers are numbers."""
    return all(isinstance(found.get(key), fx.Node) and reads_no_input(found[key]) for key in keys) and all(
        isinstance(found.get(name), (int, float)) for name in numbers
    )


def _check_together(graph: fx.Graph, new: Mapping[str, LinearFamily]) -> None:
    """Raise PassError where a linear, by the name of its node, gets a delta beside one, of which either takes no other."""
    by_role = {role: family for family in families() for role in family.roles}
    for total in graph.nodes:
        family = new.get(changed_linear(total).name) if ends_delta(total) else None
        if family is None:
            continue
        old = by_role.get(role_of(total))
        if family.exclusive or (isinstance(old, LinearFamily) and old.exclusive):
            raise PassError(
                f"{total.meta.get('site')} has a delta of the family {old.name if old else role_of(total)!r} already, and one of "
                f"{family.name!r} beside it would change another weight than it was made for: merge it first, or exclude that "
                "linear"
            )


def _bound(total: fx.Node) -> str:
    """What a delta depends on besides its linear; "" for one that depends on the linear and its input alone."""
    if traits_of(changed_linear(total)).kind is not Kind.LINEAR:
        return BY_EXPERTS
    stack, seen = [item for item in total.all_input_nodes if item is not total.args[0]], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node in seen or not is_delta(node) or ends_delta(node):
            continue
        seen.add(node)
        if node.target is aten.index_select.default:
            return BY_ROWS
        stack += node.all_input_nodes
    return ""
