"""Families whose deltas sit on linears: what they have in common; each says its own form in the graph."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from bmgraph.analysis.structure.sites import Linear
from bmgraph.analysis.weight_sites import Weight
from bmgraph.deltas.backbone import freeze_backbone
from bmgraph.deltas.changed_weights import with_changed_weights
from bmgraph.deltas.delta_calls import DeltaCalls, delta_base, delta_input
from bmgraph.deltas.family import Change, Delta, DeltaFamily, Part
from bmgraph.deltas.module_matching import Sizes, match_modules, module_name
from bmgraph.errors import InputError, PassError
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import ends_delta, is_delta, role_of
from bmgraph.ir.pass_record import Edit
from bmgraph.ir.program import Program
from bmgraph.ir.shape_inference import dim_text
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of

aten = torch.ops.aten

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

    @abstractmethod
    def build(
        self, call: DeltaCalls, tensors: Mapping[str, fx.Node], change: Change, options: Mapping[str, Any]
    ) -> fx.Node:
        """Add one delta after `call.linear` and return the node of its total (`call.end`); `tensors` read its parameters."""

    @abstractmethod
    def read(self, total: fx.Node) -> Delta:
        """The delta that ends in a total with a role of the family, on a linear. Raises PassError where it has another form."""

    @abstractmethod
    def sizes(self, change: Change) -> Sizes:
        """Outputs and inputs of the linear that a change fits; None where any number does."""

    @abstractmethod
    def describe(self, change: Change) -> str:
        """A change, or several stacked ones, in a few words for the report: "rank 8"."""

    @abstractmethod
    def stacked(self, changes: Mapping[int, Change], count: int) -> Change:
        """The changes of one linear, by number, as tensors whose first axis is the number, 0 to `count`.

        Numbers without a change, and 0, change nothing.
        """

    @abstractmethod
    def build_rows(self, call: DeltaCalls, x: fx.Node, chosen: Mapping[str, fx.Node]) -> fx.Node:
        """As `build`, with tensors that have one entry for each row of the linear's input `x`."""

    def recognise(self, graph: fx.Graph) -> list[Delta]:
        """The deltas of the family in a graph: its own form on linears, and what depends on rows or experts besides."""
        found = []
        for total in graph.nodes:
            if ends_delta(total) and role_of(total) in self.roles:
                bound = _bound(total)
                site, linear = str(total.meta.get("site")), delta_base(total)
                found.append(Delta(self, site, linear, total, bound) if bound else self.read(total))
        return found

    def check_fits(self, program: Program, part: Part) -> None:
        """Raise MisplacedError where a module is missing, or has another shape."""
        match_modules(program, part, self.sizes)

    def attach(self, program: Program, part: Part, by: str) -> list[Edit]:
        """Add the loaded deltas to every use of their modules."""
        added: list[tuple[Linear, NewDelta]] = []
        edits: list[Edit] = []
        stems: set[str] = set()
        for module, linear in match_modules(program, part, self.sizes).items():
            change = part.changes[module]
            stem = self.free_stem(program, linear.name, taken=stems)
            stems.add(stem)
            added.append((linear, NewDelta(self, linear.name, stem, change, part.options)))
            edits.append(Edit(linear.name, f"{self.describe(change)} of {module}"))
        attach_all(program, added, by)
        return edits

    def changed(self, program: Program, part: Part) -> Program:
        """A copy whose linears multiply by the weights that the deltas make of theirs."""
        changes = [
            (use.node, self, part.changes[module])
            for module, linear in match_modules(program, part, self.sizes).items()
            for use in linear.uses
        ]
        return with_changed_weights(program, changes)

    def attach_rows(
        self, editor: Editor, selector: fx.Node, parts: Mapping[int, Part], names: tuple[str, ...]
    ) -> list[Edit]:
        """Stack the deltas of each linear; each row takes the entry of its number."""
        changes: dict[Linear, dict[int, Change]] = {}
        for number, part in parts.items():
            for module, linear in match_modules(editor.program, part, self.sizes).items():
                changes.setdefault(linear, {})[number] = part.changes[module]
        nodes = {node.name: node for node in editor.graph.nodes}
        edits = []
        for linear, by_number in changes.items():
            stacked = self.stacked(by_number, len(names))
            _check_stacked(self, linear.name, stacked, len(names))
            uses = [nodes[use.node] for use in linear.uses]
            readers = _stacked_parameters(self, editor, linear.name, stacked, uses[0])
            for use in uses:
                x = _input_of_rows(editor.program, linear.name, use, selector)
                call = DeltaCalls(editor, use, linear.name, self.roles[0])
                chosen = {
                    key: call(aten.index_select.default, reader, 0, selector)
                    for key, reader in readers.items()
                }
                self.build_rows(call, x, chosen)
            who = ", ".join(names[number - 1] for number in by_number)
            edits.append(Edit(linear.name, f"{self.describe(stacked)}: {who}"))
        return edits

    def why_not_folded(self, program: Program, delta: Delta, weight: Weight) -> str:
        """Empty: a change of the output that the input does not decide is a change of weight and bias."""
        return ""

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
            if any(node.op != "get_attr" for node in delta.tensors.values()):
                raise InputError(
                    f"the delta on {module} cannot be saved: PEFT's format supports no delta on some outputs of a linear "
                    f"(a role within a fused one); use targets=({module!r},), or save the whole program"
                )
            found.setdefault(module, {}).setdefault(delta.key, delta)
        return {module: list(deltas.values()) for module, deltas in found.items()}


@dataclass(frozen=True)
class NewDelta:
    """A delta to add to a linear. `stem` is the prefix of its parameters' names, which end with the keys of its change.

    The parameters get the program's device and the linear's dtype.
    """

    family: LinearFamily
    site: str
    stem: str
    change: Change
    options: Mapping[str, Any] = field(default_factory=dict)

    def attach(self, editor: Editor, linear: fx.Node) -> fx.Node:
        """Add the delta to one use of the linear, and its parameters at the first use. Returns the node of the total."""
        call = DeltaCalls(editor, linear, self.site, self.family.roles[0])
        readers = {
            key: self._read(editor, linear, key, tensor) for key, tensor in self.change.tensors.items()
        }
        return self.family.build(call, readers, self.change, self.options)

    def _read(self, editor: Editor, linear: fx.Node, key: str, tensor: torch.Tensor) -> fx.Node:
        name = f"{self.stem}_{key}"
        if name in editor.program.parameters:
            return editor.read(name)
        dtype = linear.meta["val"].dtype if tensor.is_floating_point() else tensor.dtype
        value = tensor.to(device=editor.program.device, dtype=dtype)
        node = editor.parameter(name, value, like=linear, part=self.family.roles[0])
        node.meta["site"] = self.site
        return node


def attach_all(program: Program, deltas: Iterable[tuple[Linear, NewDelta]], by: str) -> None:
    """Add each delta to every use of its linear, then freeze the backbone. `by` names the pass."""
    pairs = list(deltas)
    for graph in program.graphs:
        with program.edit(graph, by=by) as editor:
            nodes = {node.name: node for node in editor.graph.nodes}
            for linear, delta in pairs:
                for use in linear.uses:
                    if use.graph == graph:
                        delta.attach(editor, nodes[use.node])
    freeze_backbone(program)


def of_no_family(total: fx.Node, expected: str) -> PassError:
    """The error for nodes that have the role of a delta and no known form; `expected` is the form."""
    return PassError(
        f"the delta on {total.meta.get('site') or total.name}, added by "
        f"{total.meta.get('pass') or 'an unknown pass'} at {total.name}, is of no family: its role "
        f"{role_of(total)!r} is for {expected}; give its nodes the role of a family of their own"
    )


def _bound(total: fx.Node) -> str:
    """What a delta depends on besides its linear; "" for one that depends on the linear and its input alone."""
    if traits_of(delta_base(total)).kind is not Kind.LINEAR:
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


def _check_stacked(family: LinearFamily, site: str, stacked: Change, count: int) -> None:
    """Raise PassError unless each stacked tensor has one entry for each number, 0 to `count`."""
    for key, tensor in stacked.tensors.items():
        if not tensor.dim() or len(tensor) != count + 1:
            raise PassError(
                f"{site}: the family {family.name!r} stacks {count} deltas as {key} of shape {list(tensor.shape)}: expected "
                f"{count + 1} entries along the first axis, of which entry 0 changes nothing"
            )


def _stacked_parameters(
    family: LinearFamily, editor: Editor, site: str, stacked: Change, like: fx.Node
) -> dict[str, fx.Node]:
    """The nodes that read the stacked tensors of one linear, which are frozen."""
    program, readers = editor.program, {}
    for key, tensor in stacked.to(like.meta["val"].dtype, program.device).tensors.items():
        name = editor.fresh(f"{site}_deltas_{key}")
        readers[key] = editor.parameter(name, tensor, frozen=True, part=family.roles[0])
    for reader in readers.values():
        reader.meta["site"] = site
    return readers


def _input_of_rows(program: Program, site: str, linear: fx.Node, selector: fx.Node) -> fx.Node:
    """The input of a linear, which must have one row per row of the batch; raises PassError where it has not."""
    x = delta_input(linear)
    sizes = x.meta["val"].shape
    rows, expected = (dim_text(program, size) for size in (sizes[0], selector.meta["val"].shape[0]))
    if len(sizes) < 2 or rows != expected:
        raise PassError(
            f"{site} takes {rows} rows where the batch has {expected}: deltas cannot be selected per row there; merge "
            "one delta, or use deltas that do not change that linear"
        )
    return x
