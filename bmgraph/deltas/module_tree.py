"""A program as a tree of modules: tensors with their shapes, what of them trains, deltas, counts and shares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from bmgraph.analysis.structure.finder import find
from bmgraph.deltas.family import Change, Delta
from bmgraph.deltas.linear_family import LinearFamily
from bmgraph.deltas.registry import deltas_of, families
from bmgraph.ir.program import Program
from bmgraph.ir.tensor_spec import type_text

TRAINS, FROZEN, BUFFER = "trains", "frozen", "buffer"
"""What training does with a tensor; a buffer is changed by the model itself, if at all."""


@dataclass(frozen=True)
class Held:
    """A tensor of a module: its name there, its type such as `f32[4, 6]`, `TRAINS`, `FROZEN` or `BUFFER`, and its elements, 0 for
    one of truth values (a mask).

    family: that of the delta it belongs to; factor: that of the learning rate at which it trains; tied: other names of it.
    """

    name: str
    type: str
    state: str
    elements: int
    bytes: int
    family: str = ""
    factor: float = 1.0
    tied: tuple[str, ...] = ()

    def __str__(self) -> str:
        notes = [
            self.state if self.factor == 1 else f"{self.state} at {self.factor:g} times the learning rate"
        ]
        notes += [f"of {self.family}"] if self.family else []
        notes += [f"also {', '.join(self.tied)}"] if self.tied else []
        return f"{self.name}: {self.type}  {', '.join(notes)}"

    def as_json(self) -> dict[str, object]:
        """Its fields, those that say something."""
        found: dict[str, object] = {
            "name": self.name, "type": self.type, "state": self.state, "elements": self.elements, "bytes": self.bytes,
        }  # fmt: skip
        found |= {"family": self.family} if self.family else {}
        found |= {"factor": self.factor} if self.factor != 1 else {}
        return found | ({"tied": list(self.tied)} if self.tied else {})


@dataclass(frozen=True)
class ModuleTree:
    """A module: its path ("" for the model), the role of its weight in the model, its deltas in a few words, its own tensors, and
    the modules in it.

    Prints as an indented tree, in which equal modules in a row (layers) are one entry.
    """

    path: str
    role: str
    deltas: tuple[str, ...]
    tensors: tuple[Held, ...]
    children: tuple[ModuleTree, ...]

    def every(self) -> Iterator[Held]:
        """The tensors of the module and of all modules in it."""
        yield from self.tensors
        for child in self.children:
            yield from child.every()

    @property
    def parameters(self) -> int:
        """Elements of all parameters, masks left out."""
        return sum(item.elements for item in self.every() if item.state != BUFFER)

    @property
    def trained(self) -> int:
        """Elements of the parameters that train."""
        return sum(item.elements for item in self.every() if item.state == TRAINS)

    @property
    def share(self) -> float:
        """The trained share of all parameters."""
        return self.trained / max(1, self.parameters)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors, each once."""
        return sum(item.bytes for item in self.every())

    def as_json(self) -> dict[str, object]:
        """The tree as numbers, texts, lists and tables."""
        return {
            "path": self.path, "role": self.role, "parameters": self.parameters, "trained": self.trained,
            "share": self.share, "bytes": self.bytes, "deltas": list(self.deltas),
            "tensors": [item.as_json() for item in self.tensors], "modules": [child.as_json() for child in self.children],
        }  # fmt: skip

    def __str__(self) -> str:
        return "\n".join(_lines(self, self.path or "model", 0))


def module_tree(program: Program) -> ModuleTree:
    """The tree of a program's tensors, by the modules in their names.

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.passes import LoRA
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 2))
        >>> program = bg.Pipeline([LoRA(r=1, targets=("1",))]).run(bg.capture(model, (torch.randn(3, 6),)))
        >>> print(program.tree())
        model: 44 parameters, 6 train (13.6%), 176 bytes
          0  linear: 28 parameters, none train
            weight: f32[4, 6]  frozen
            bias: f32[4]  frozen
          1  linear, delta lora (rank 1): 16 parameters, 6 train (37.5%)
            weight: f32[2, 4]  frozen
            bias: f32[2]  frozen
            weight_lora_a: f32[1, 4]  trains, of lora
            weight_lora_b: f32[2, 1]  trains, of lora
    """
    structure = find(program)
    roles = {linear.path: linear.role for linear in structure.linears}
    for norm in structure.norms:
        roles.setdefault(norm.name.rpartition(".")[0], "norm")
    for embedding in structure.embeddings:
        roles.setdefault(embedding.name.rpartition(".")[0], "embedding")
    deltas: dict[str, dict[str, None]] = {}
    for graph in program.graphs.values():
        for delta in deltas_of(graph):
            deltas.setdefault(delta.site.rpartition(".")[0], {})[_described(delta)] = None
    tensors: dict[str, list[Held]] = {}
    for name, held in _held(program):
        tensors.setdefault(name.rpartition(".")[0], []).append(held)
    return _module("", roles, {path: tuple(found) for path, found in deltas.items()}, tensors)


def _described(delta: Delta) -> str:
    """The family of a delta and what it is, told without its values."""
    if delta.bound or not isinstance(delta.family, LinearFamily) or not delta.tensors:
        return f"{delta.family.name} ({delta.bound})" if delta.bound else delta.family.name
    shapes = {key: node.meta["val"] for key, node in delta.tensors.items()}
    return f"{delta.family.name} ({delta.family.describe(Change(shapes, delta.numbers))})"


def _held(program: Program) -> Iterator[tuple[str, Held]]:
    """Every parameter and buffer, by its whole name."""
    owner = {name: family.name for family in families() for name in family.tensors(program)}
    aliases: dict[str, list[str]] = {}
    for alias, name in program.ties.items():
        aliases.setdefault(name, []).append(alias)
    for name, tensor in program.tensors().items():
        trains = name not in program.frozen and tensor.is_floating_point()
        state = BUFFER if name in program.buffers else TRAINS if trains else FROZEN
        counted = 0 if tensor.dtype == torch.bool else tensor.numel()
        yield name, Held(
            name.rpartition(".")[2], type_text(tensor.dtype, tuple(tensor.shape)), state, counted, tensor.nbytes,
            owner.get(name, ""), program.lr_factors.get(name, 1.0), tuple(aliases.get(name, ())),
        )  # fmt: skip


def _module(
    path: str,
    roles: Mapping[str, str],
    deltas: Mapping[str, tuple[str, ...]],
    tensors: Mapping[str, list[Held]],
) -> ModuleTree:
    """The module at a path, with those in it in the order of their tensors."""
    start = f"{path}." if path else ""
    inside = (
        name[len(start) :].partition(".")[0] for name in tensors if name.startswith(start) and name != path
    )
    children = tuple(
        _module(f"{start}{name}", roles, deltas, tensors) for name in dict.fromkeys(inside) if name
    )
    return ModuleTree(path, roles.get(path, ""), deltas.get(path, ()), tuple(tensors.get(path, ())), children)


def _lines(tree: ModuleTree, name: str, depth: int, count: int = 1) -> Iterator[str]:
    """One line for the module, one for each tensor of its own, then the modules in it."""
    what = [tree.role] if tree.role else []
    what += [f"delta {item}" for item in tree.deltas]
    trained = f"{tree.trained:,} train ({tree.share:.1%})" if tree.trained else "none train"
    size = f", {tree.bytes:,} bytes" if not depth else ""
    each = f" ({count} equal, each)" if count > 1 else ""
    kind = f"  {', '.join(what)}" if what else ""
    yield f"{'  ' * depth}{name}{each}{kind}: {tree.parameters:,} parameters, {trained}{size}"
    for item in tree.tensors:
        yield f"{'  ' * (depth + 1)}{item}"
    for _, group in groupby(tree.children, key=_unnamed):
        equal = list(group)
        ends = [child.path.rpartition(".")[2] for child in (equal[0], equal[-1])]
        label = ends[0] if len(equal) == 1 else f"{ends[0]}..{ends[1]}"
        yield from _lines(equal[0], label, depth + 1, len(equal))


def _unnamed(tree: ModuleTree, top: bool = True) -> ModuleTree:
    """The module as all modules like it are: with the names of what is in it, but without its own path and other names."""
    path = "" if top else tree.path.rpartition(".")[2]
    tensors = tuple(replace(item, tied=()) if item.tied else item for item in tree.tensors)
    return replace(
        tree, path=path, tensors=tensors, children=tuple(_unnamed(child, False) for child in tree.children)
    )
