"""Modules of the model that train whole beside a delta and are saved with it, as PEFT's `modules_to_save`."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import fx

from bmgraph.analysis.site_filter import nearest
from bmgraph.analysis.weight_sites import site_path
from bmgraph.deltas.low_rank import backbone_of
from bmgraph.errors import PassError
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import is_delta
from bmgraph.ir.program import Program

aten = torch.ops.aten


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


def train_whole(program: Program, names: Sequence[str]) -> None:
    """Let parameters and buffers of the model train whole as parts of its delta.

    A tied one becomes a parameter of its own, as PEFT's copy of a module is. Raises PassError for codes, which cannot be
    trained.
    """
    for name in names:
        found = program.tensor(name)
        if name not in program.buffers and not found.is_floating_point():
            raise PassError(
                f"{name} holds {str(found.dtype).removeprefix('torch.')} codes, which cannot be trained whole: choose "
                "the module before its weight is quantized, or exclude it from quantizing"
            )
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
    module, own = site_path(name), False
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
