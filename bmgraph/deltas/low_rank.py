"""Low-rank deltas (LoRA) on linears: adds them to a graph and finds them in it.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models". A delta has this form in the graph:

    y      = linear(x, W, b)
    change = mul(linear(linear(dropout(x), A), B), scale)     A [r, in], B [out, r]
    total  = add(y, change)

If only some outputs of a linear change (the queries of a fused q/k/v), `mul(B, rows)` replaces B; rows is bool[out, 1].
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.structure.sites import Linear
from bmgraph.errors import VerificationError
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import DELTA, PROMPT, adds_delta
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of

aten = torch.ops.aten

LETTERS = ("a", "b", "rows")
"""Ends of the names of a delta's parameters."""


class DeltaCalls:
    """Inserts consecutive calls after a linear, each marked as part of the delta on `site`."""

    def __init__(self, editor: Editor, linear: fx.Node, site: str) -> None:
        self._editor, self._linear, self._site = editor, linear, site
        self._last = linear

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        """Insert one more call after the last one."""
        self._last = self._editor.call(
            target, *args, like=self._linear, after=self._last, site=self._site, part=DELTA
        )
        return self._last

    def add(self, change: fx.Node) -> fx.Node:
        """Insert linear + change and let all users of the linear read it. Returns the node of the sum."""
        total = self(aten.add.Tensor, self._linear, change)
        self._editor.replace(self._linear, total)
        return total


@dataclass(frozen=True)
class NewDelta:
    """A delta to add to a linear: `scale * B A` with A [r, in], B [out, r]; `rows` bool[out, 1] selects outputs to change.

    `stem` is the prefix of its parameters' names. The parameters get the program's device and the linear's dtype.
    """

    site: str
    stem: str
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    rows: torch.Tensor | None = None
    dropout: float = 0.0

    def attach(self, editor: Editor, linear: fx.Node) -> fx.Node:
        """Add the delta to one use of the linear, and its parameters at the first use. Returns the node of the total."""
        call = DeltaCalls(editor, linear, self.site)
        x = delta_input(linear)
        a, b = self._read(editor, linear, "a", self.a), self._read(editor, linear, "b", self.b)
        if self.rows is not None:
            b = call(aten.mul.Tensor, b, self._read(editor, linear, "rows", self.rows))
        if self.dropout:
            x = call(aten.dropout.default, x, self.dropout, True)
        down = call(aten.linear.default, x, a)
        return call.add(call(aten.mul.Tensor, call(aten.linear.default, down, b), self.scale))

    def _read(self, editor: Editor, linear: fx.Node, letter: str, tensor: torch.Tensor) -> fx.Node:
        name = f"{self.stem}_{letter}"
        if name in editor.program.parameters:
            return editor.read(name)
        dtype = linear.meta["val"].dtype if tensor.is_floating_point() else tensor.dtype
        value = tensor.to(device=editor.program.device, dtype=dtype)
        node = editor.parameter(name, value, like=linear, part=DELTA)
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


@dataclass(frozen=True)
class Delta:
    """A delta found on one use of a linear. `b` is the expression of B, with `rows` multiplied in if there are any."""

    site: str
    linear: fx.Node
    total: fx.Node
    a: fx.Node
    b: fx.Node
    scale: float
    dropout: float

    def change(self, program: Program) -> torch.Tensor:
        """The change of the weight, [out, in]."""
        return self.scale * (evaluate(program, self.b) @ evaluate(program, self.a))


def delta_input(linear: fx.Node) -> fx.Node:
    """The input of a delta: the input of its linear before any rounding."""
    x: Any = linear.args[0]
    while traits_of(x).kind is Kind.ROUNDING:
        x = x.args[0]
    assert isinstance(x, fx.Node)
    return x


def delta_base(total: fx.Node) -> fx.Node:
    """The product that a total changes, below all deltas stacked on it."""
    node: Any = total
    while adds_delta(node):
        node = node.args[0]
    assert isinstance(node, fx.Node)
    return node


def deltas_of(graph: fx.Graph) -> list[Delta]:
    """All deltas of a graph in order; of several on one linear the last added comes first."""
    return [_read_delta(node) for node in graph.nodes if adds_delta(node) and not _bound(node)]


def bound_deltas_of(graph: fx.Graph) -> dict[str, str]:
    """Site -> why its delta is not `scale * B A` on a linear: it depends on chosen experts or on the row."""
    return {
        str(node.meta["site"]): bound for node in graph.nodes if adds_delta(node) and (bound := _bound(node))
    }


def free_stem(program: Program, site: str, label: str = "", taken: Container[str] = ()) -> str:
    """An unused prefix for the parameter names of a new delta, which is not in `taken` either.

    `label` distinguishes deltas on parts of one linear.
    """
    prefix = f"{site}_{label}_lora" if label else f"{site}_lora"
    names = program.tensors()
    count, free = 1, prefix
    while free in taken or any(f"{free}_{letter}" in names for letter in LETTERS):
        count += 1
        free = f"{prefix}_{count}"
    return free


def freeze_backbone(program: Program) -> None:
    """Freeze every parameter except those of deltas and prompts, and all integer parameters.

    What is frozen already stays so: deltas of which each row selects one, or a delta that the user froze.
    """
    program.frozen |= frozenset(backbone_of(program)) | {
        name for name, tensor in program.parameters.items() if not tensor.is_floating_point()
    }


def check_backbone_frozen(program: Program) -> None:
    """Raise VerificationError where a parameter trains that belongs to no delta and no prompt."""
    trains = sorted(set(backbone_of(program)) - program.frozen)
    if trains:
        raise VerificationError(
            f"{trains[0]!r} of the backbone is left to train ({len(trains)} parameters in all)"
        )


def backbone_of(program: Program) -> dict[str, torch.Tensor]:
    """Name -> tensor of all parameters that belong to no delta and no prompt."""
    trained: set[str] = set(program.trained_whole)
    for graph in program.graphs.values():
        trained |= {
            str(node.target)
            for node in graph.nodes
            if node.op == "get_attr" and node.meta.get("part") in (DELTA, PROMPT)
        }
    return {name: tensor for name, tensor in program.parameters.items() if name not in trained}


def rows_of(runs: Iterable[tuple[int, int]], size: int) -> torch.Tensor:
    """bool[size, 1]: which outputs are in one of the ranges (start, stop)."""
    rows = torch.zeros(size, 1, dtype=torch.bool)
    for start, stop in runs:
        rows[start:stop] = True
    return rows


def _bound(total: fx.Node) -> str:
    """What a delta depends on besides its linear; "" for a plain delta."""
    if traits_of(delta_base(total)).kind is not Kind.LINEAR:
        return "experts that each token chooses"
    change: Any = total.args[1]
    scaled = change.target is aten.mul.Tensor and isinstance(change.args[1], (int, float))
    return "" if scaled and change.args[0].target is aten.linear.default else "rows that choose their own"


def _read_delta(total: fx.Node) -> Delta:
    """The delta that ends in a total."""
    change: Any = total.args[1]
    up, scale = change.args
    down, b = up.args[:2]
    x, a = down.args[:2]
    dropped = traits_of(x).kind is Kind.DROPOUT and x.meta.get("part") == DELTA
    return Delta(
        str(total.meta["site"]),
        delta_base(total),
        total,
        a,
        b,
        float(scale),
        float(x.args[1]) if dropped else 0.0,
    )
