"""Modules of the model that train whole beside a delta and are saved with it, as PEFT's `modules_to_save`: a family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.site_filter import nearest
from bmgraph.deltas.backbone import backbone_of
from bmgraph.deltas.family import PREFIX, Delta, DeltaFamily, Part, Room, Saved
from bmgraph.deltas.file_values import check_values
from bmgraph.deltas.low_rank_format import low_rank_config
from bmgraph.deltas.module_matching import module_name
from bmgraph.deltas.peft_config import flag
from bmgraph.deltas.registry import deltas_of
from bmgraph.deltas.weighted_sum import Combination
from bmgraph.errors import BundleError, InputError, MisplacedError, PassError
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import is_delta
from bmgraph.ir.pass_record import Edit
from bmgraph.ir.program import Program
from bmgraph.utils.digest import fingerprint

aten = torch.ops.aten


@dataclass(frozen=True)
class WholePart(Part):
    """Tensors of whole modules, by name.

    whole: the new values of tensors that were trained whole; `tied`: where such a tensor is tied to another, both get the
    value. biases: those of the tensors that train as biases alone, which stay tied. copies: what PEFT saves of the backbone
    itself, for vocabularies that grew.
    """

    whole: Mapping[str, torch.Tensor] = field(default_factory=dict)
    copies: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tied: bool = False
    biases: frozenset[str] = frozenset()

    @property
    def empty(self) -> bool:
        """Whether nothing was trained whole."""
        return not self.whole


class WholeModules(DeltaFamily):
    """Tensors of the model that train whole (`Program.trained_whole`), saved beside the deltas of another family."""

    name = "modules_to_save"
    roles = ()
    beside = True
    alone = MappingProxyType({"peft_type": "LORA", **low_rank_config({}, 0.0, False)})
    """PEFT has modules alone as an adapter of plain LoRA without factors."""

    def tensors(self, program: Program) -> frozenset[str]:
        """What trains whole."""
        return program.trained_whole

    def recognise(self, graph: fx.Graph) -> list[Delta]:
        """None: no node of the graph tells what trains whole."""
        return []

    def contents(self, part: Part) -> dict[str, Any]:
        """The values by name."""
        assert isinstance(part, WholePart)
        return {**part.whole, **part.copies}

    def saved(self, program: Program) -> Saved | None:
        """Each tensor, pruned where the program prunes it. Raises InputError where a pass has replaced one."""
        tensors = program.tensors()
        missing = sorted(program.trained_whole - set(tensors))
        if missing:
            raise InputError(
                f"{', '.join(missing[:3])} was trained with the delta and is not a tensor of the program any more: a pass has "
                "replaced it; save the delta of the program before that pass, or save the whole program"
            )
        if not program.trained_whole:
            return None
        masks = {name: mask_of(program, name) for name in program.trained_whole}
        values = {
            name: tensors[name] if (mask := masks[name]) is None else tensors[name] * mask
            for name in sorted(program.trained_whole)
        }
        biases = _biases_alone(program)
        with_delta = {
            f"{module_name(program, delta.site, delta.linear)}.bias"
            for graph in program.graphs.values()
            for delta in deltas_of(graph)
        }
        whole = {
            PREFIX
            + (f"{name.removesuffix('bias')}base_layer.bias" if name in biases & with_delta else name): value
            for name, value in values.items()
        }
        modules = sorted({name.rpartition(".")[0] for name in program.trained_whole - biases})
        config: dict[str, Any] = {"modules_to_save": modules} if modules else {}
        return Saved(self, config | ({"bias": "all"} if biases else {}), whole)

    def loaded(self, path: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> Part:
        """Take all tensors that are left; raises BundleError for one that is not a tensor of the model."""
        modules = config.get("modules_to_save") or []
        if not isinstance(modules, list) or not all(isinstance(name, str) and name for name in modules):
            raise BundleError(f"{path} has modules_to_save={modules!r}: expected a list of names")
        with_biases = config.get("bias", "none") != "none"
        whole: dict[str, torch.Tensor] = {}
        copies: dict[str, torch.Tensor] = {}
        biases: set[str] = set()
        for key in list(tensors):
            name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
            if not key.startswith(PREFIX):
                raise BundleError(
                    f"{path} holds {key!r}: expected {PREFIX}<module>, then a tensor of the delta or of a module that was "
                    "trained whole"
                )
            value = tensors.pop(key)
            check_values(path, name, value)
            in_module = any(module.endswith(end) for module in modules_of(name) for end in modules)
            if with_biases and not in_module and name.rpartition(".")[2] == "bias":
                biases.add(name)
            (whole if in_module or name in biases else copies)[name] = value
        tied = flag(path, config, "ensure_weight_tying")
        return WholePart(self, path, {}, {}, whole, copies, tied, frozenset(biases))

    def check_fits(self, program: Program, part: Part) -> None:
        """Raise MisplacedError where a tensor is missing, has another shape, or is pruned to keep other elements."""
        assert isinstance(part, WholePart)
        for name, value in {**part.copies, **part.whole}.items():
            _check_tensor(program, part, name, value)
            _check_mask(program, part, program.ties.get(name, name), value)

    def attach(self, program: Program, part: Part, by: str) -> list[Edit]:
        """Give the tensors that were trained whole their values, and those of which PEFT saved a copy.

        Raises MisplacedError where the program has no such tensor, or one of another shape.
        """
        assert isinstance(part, WholePart)
        edits = []
        for name, value in {**part.copies, **part.whole}.items():
            _check_tensor(program, part, name, value)
            old = program.tensor(name)
            value = value.to(device=old.device, dtype=old.dtype)
            if name in part.copies and (old.device.type == "meta" or torch.equal(value, old)):
                continue
            if name in part.whole and not part.tied:
                train_whole(program, [name], together=name in part.biases)
            kept = program.ties.get(name, name)
            if part.tied and name in part.whole:
                program.trained_whole |= {kept}
            _check_mask(program, part, kept, value)
            table = program.buffers if kept in program.buffers else program.parameters
            table[kept] = value
            edits.append(Edit(name, f"set to the value in {part.path.name}"))
            if name in part.copies:
                program.fingerprint = fingerprint(backbone_of(program))
        return edits

    def changed(self, program: Program, part: Part) -> Program:
        """A copy with the values set."""
        copy = program.clone()
        self.attach(copy, part, "")
        return copy

    def attach_rows(
        self,
        editor: Editor,
        selector: fx.Node,
        parts: Mapping[int, Part],
        names: tuple[str, ...],
        room: Room | None = None,
    ) -> list[Edit]:
        """Nothing; raises PassError where a tensor has another value than the program's, which no row can choose."""
        for number, part in parts.items():
            _check_nothing_whole(editor.program, names[number - 1], part, "which a row cannot choose")
        return []

    def combined(
        self, program: Program, parts: Sequence[tuple[str, float, Part]], how: Combination, rank: int | None
    ) -> Part:
        """Nothing; raises PassError where a tensor has another value than the program's."""
        for name, _, part in parts:
            _check_nothing_whole(program, name, part, "of which there is no weighted sum")
        return WholePart(self, parts[0][2].path, {})


def _check_nothing_whole(program: Program, name: str, part: Part, why_not: str) -> None:
    """Raise PassError where a delta changes a tensor of the model whole."""
    assert isinstance(part, WholePart)
    same = [tensor for tensor, value in part.copies.items() if _same(program, tensor, value)]
    changed = [tensor for tensor in (*part.copies, *part.whole) if tensor in part.whole or tensor not in same]
    if changed:
        raise PassError(
            f"delta {name!r} in {part.path} changes {', '.join(changed[:3])} whole (modules_to_save), {why_not}: load it alone "
            "with LoadDelta"
        )


def _biases_alone(program: Program) -> frozenset[str]:
    """The biases that train whole in modules of which nothing else does."""
    others = {name.rpartition(".")[0] for name in program.trained_whole if not name.endswith(".bias")}
    return frozenset(
        name
        for name in program.trained_whole
        if name.endswith(".bias") and name.rpartition(".")[0] not in others
    )


def module_tensors(program: Program, patterns: Sequence[str], option: str) -> list[str]:
    """The names of all parameters and buffers of the modules that the patterns name, tied names included.

    A pattern is a glob over module paths, or their end after a dot, as in PEFT. Raises PassError for one that fits no
    module with tensors; the message names `option` and modules near it.
    """
    masks = {name for name, tensor in program.parameters.items() if tensor.dtype == torch.bool}  # of Prune
    found = [*backbone_of(program), *program.trained_whole, *program.buffers, *program.ties]
    names = [name for name in found if name not in masks]
    modules = {name: modules_of(name) for name in names}
    chosen: list[str] = []
    for pattern in patterns:
        fitting = [name for name in names if any(fits(path, pattern) for path in modules[name])]
        if not fitting:
            near = nearest(pattern, sorted({path for paths in modules.values() for path in paths}))
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise PassError(f"{option}={pattern!r} fits no module with parameters{hint}")
        chosen += [name for name in fitting if name not in chosen]
    return chosen


def fits(path: str, pattern: str) -> bool:
    """Whether a module path matches a glob, or ends with it after a dot."""
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")


def train_whole(program: Program, names: Sequence[str], together: bool = False) -> None:
    """Let parameters and buffers of the model train whole as parts of its delta.

    A tied one becomes a parameter of its own, as PEFT's copy of a module is; together: it trains for all its uses, as PEFT's
    biases do. Raises PassError for codes, which cannot be trained.
    """
    names = [program.ties.get(name, name) for name in names] if together else names
    for name in names:
        found = program.tensor(name)
        if name not in program.buffers and not found.is_floating_point():
            raise PassError(
                f"{name} holds {str(found.dtype).removeprefix('torch.')} codes, which cannot be trained whole: choose "
                "the module before its weight is quantized, or exclude it from quantizing"
            )
        if not together:
            untie(program, name)
    program.trained_whole |= frozenset(names)
    program.frozen -= program.trained_whole


def untie(program: Program, name: str) -> None:
    """Give a tied parameter a tensor of its own: it is read where its module is, other uses keep the shared one.

    Nothing changes for a parameter that is not tied. Raises PassError where no use is in that module.
    """
    kept = program.ties.get(name, name)
    aliases = [alias for alias, target in program.ties.items() if target == kept]
    if not aliases:
        return
    if any(is_delta(node) and node.meta.get("site") == kept for node in _nodes(program)):
        raise PassError(
            f"{name} is tied and has a delta already: choose the modules that train whole before it"
        )
    moved = name if name != kept else aliases[0]
    module, own = name.rpartition(".")[0], False
    for graph in program.graphs:
        with program.edit(graph) as editor:
            reads = _reads(editor.graph, kept)
            mine = [read for read in reads if read[1].meta.get("scope") == module]
            own = own or bool(mine)
            others = [read for read in reads if read not in mine]
            _move(editor, kept, moved, mine if name != kept else others)
    if not own:
        raise PassError(
            f"{name} is tied to {(kept, *aliases)[name == kept]}, and no use of it is in {module}"
        )
    for alias in aliases:
        if alias == moved:
            del program.ties[alias]
        elif name == kept:
            program.ties[alias] = moved


def mask_of(program: Program, name: str) -> torch.Tensor | None:
    """The bool mask that the program multiplies a tensor by wherever it reads it, as Prune does; None if it reads it plain."""
    for node in _nodes(program):
        if node.op != "get_attr" or node.target != name:
            continue
        for user in node.users:
            other = user.args[1] if user.target is aten.mul.Tensor and user.args[0] is node else None
            if isinstance(other, fx.Node) and other.op == "get_attr":
                mask = program.tensor(str(other.target))
                if mask.dtype == torch.bool:
                    return mask
    return None


def _nodes(program: Program) -> list[fx.Node]:
    return [node for graph in program.graphs.values() for node in graph.nodes]


def modules_of(name: str) -> list[str]:
    """The paths of the modules that hold a tensor, from the innermost."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _reads(graph: fx.Graph, name: str) -> list[tuple[fx.Node, fx.Node]]:
    """(what is read, reader) of a parameter: the reader of a transposed weight is what reads its transpose."""
    found: list[tuple[fx.Node, fx.Node]] = []
    for node in graph.nodes:
        if node.op == "get_attr" and node.target == name:
            for user in node.users:
                transposed = user.target is aten.t.default
                found += [(user, end) for end in user.users] if transposed else [(node, user)]
    return found


def _move(editor: Editor, old: str, new: str, reads: Sequence[tuple[fx.Node, fx.Node]]) -> None:
    """Let readers read the parameter `new`, made as a copy of `old` where it is missing."""
    if not reads:
        return
    program = editor.program
    if new in program.parameters:
        node = editor.read(new)
    else:
        node = editor.parameter(new, program.parameters[old].clone(), frozen=old in program.frozen)
    for value, reader in reads:
        copy = node if value.op == "get_attr" else editor.call(aten.t.default, node, like=value)
        reader.replace_input_with(value, copy)


def _same(program: Program, name: str, value: torch.Tensor) -> bool:
    found = program.tensors().get(program.ties.get(name, name))
    return found is not None and found.shape == value.shape and torch.equal(value.to(found), found)


def _check_tensor(program: Program, part: Part, name: str, value: torch.Tensor) -> None:
    if program.ties.get(name, name) not in program.tensors():
        near = nearest(name, [*program.tensors(), *program.ties])
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise MisplacedError(
            f"the delta in {part.path} holds a value of {name!r}, which is not a tensor of the program (a pass that "
            f"replaces weights, such as quantize, goes after it){hint}"
        )
    if program.tensor(name).shape != value.shape:
        raise MisplacedError(
            f"the delta in {part.path} is for another backbone: its {name} is {list(value.shape)}, the program's is "
            f"{list(program.tensor(name).shape)}"
        )
    old = program.tensor(name).dtype
    if value.dtype != old and not (value.is_floating_point() and old.is_floating_point):
        raise BundleError(
            f"the delta in {part.path} holds {name} as {value.dtype}, the program has it as {old}: no value of the one can be "
            "taken for one of the other; save the adapter in its model's type"
        )


def _check_mask(program: Program, part: Part, name: str, value: torch.Tensor) -> None:
    """Raise MisplacedError where the program would zero a part of a tensor that the adapter does not have as zero."""
    mask = mask_of(program, name)
    if mask is not None and value.device.type != "meta" and bool((value[~mask] != 0).any()):
        raise MisplacedError(
            f"the delta in {part.path} holds a value of {name!r}, of which this program is pruned to keep other elements "
            "than those that it has: load the delta before Prune, or exclude that module from Prune"
        )
