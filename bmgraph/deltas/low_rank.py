"""Deltas: low-rank changes that sit on the uses of linears. Their form, how they are added and how they are found.

    y      = linear(x, W, b)
    change = mul(linear(linear(dropout(x), A), B), scale)     A [r, in], B [out, r]
    total  = add(y, change)

Where only some outputs of a linear change (the queries of a fused q/k/v), B stands as `mul(B, rows)`, rows bool[out, 1].
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.structure.sites import Linear
from bmgraph.analysis.structure.value_origins import ROUNDINGS, stem
from bmgraph.ir.editor import Editor
from bmgraph.ir.eval_form import DROPOUTS
from bmgraph.ir.node_role import DELTA, PROMPT, adds_delta
from bmgraph.ir.program import Program

aten = torch.ops.aten


class Chain:
    """Adds calls after a linear, one behind the other, each stamped as a part of a delta on its site."""

    def __init__(self, editor: Editor, linear: fx.Node, site: str) -> None:
        self._editor, self._linear, self._site = editor, linear, site
        self._last = linear

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        """One more call."""
        self._last = self._editor.call(
            target, *args, like=self._linear, after=self._last, site=self._site, part=DELTA
        )
        return self._last

    def add(self, change: fx.Node) -> fx.Node:
        """The total, which everything reads that read the linear."""
        total = self(aten.add.Tensor, self._linear, change)
        self._editor.replace(self._linear, total)
        return total


@dataclass(frozen=True)
class NewDelta:
    """A delta to add to a linear: `scale * B A`; A [r, in], B [out, r], `rows` bool[out, 1] where some outputs stay.

    `stem` begins the names of its parameters, which get the device and dtype of what they are added to.
    """

    site: str
    stem: str
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    rows: torch.Tensor | None = None
    dropout: float = 0.0

    def attach(self, editor: Editor, linear: fx.Node) -> fx.Node:
        """Add it to one use of the linear; the parameters come with the first use. Returns the node of the total."""
        call = Chain(editor, linear, self.site)
        x = entrance(linear)
        a, b = self._read(editor, linear, "a", self.a), self._read(editor, linear, "b", self.b)
        if self.rows is not None:
            b = call(aten.mul.Tensor, b, self._read(editor, linear, "rows", self.rows))
        if self.dropout:
            x = call(aten.dropout.default, x, self.dropout, True)
        low = call(aten.linear.default, x, a)
        return call.add(call(aten.mul.Tensor, call(aten.linear.default, low, b), self.scale))

    def _read(self, editor: Editor, linear: fx.Node, letter: str, tensor: torch.Tensor) -> fx.Node:
        name = f"{self.stem}_{letter}"
        if name in editor.program.parameters:
            return editor.read(name)
        dtype = linear.meta["val"].dtype if tensor.is_floating_point() else tensor.dtype
        placed = tensor.to(device=editor.program.device, dtype=dtype)
        node = editor.parameter(name, placed, like=linear, part=DELTA)
        node.meta["site"] = self.site
        return node


def attach_all(program: Program, deltas: Iterable[tuple[Linear, NewDelta]], by: str) -> None:
    """Add deltas to every use of their linears, and let nothing else train."""
    added = list(deltas)
    for graph in program.graphs:
        with program.edit(graph, by=by) as editor:
            nodes = {node.name: node for node in editor.graph.nodes}
            for linear, delta in added:
                for use in linear.uses:
                    if use.graph == graph:
                        delta.attach(editor, nodes[use.node])
    freeze_backbone(program)


@dataclass(frozen=True)
class Delta:
    """A delta on one use of a linear, as it stands in a graph; `b` is the expression of the rows that take part."""

    site: str
    linear: fx.Node
    total: fx.Node
    a: fx.Node
    b: fx.Node
    scale: float
    dropout: float

    def change(self, program: Program) -> torch.Tensor:
        """What it adds to the weight, [out, in]."""
        return self.scale * (evaluate(program, self.b) @ evaluate(program, self.a))


def entrance(linear: fx.Node) -> fx.Node:
    """What a delta on a linear reads: what enters it, before it is rounded."""
    x: Any = linear.args[0]
    while stem(x) in ROUNDINGS:
        x = x.args[0]
    assert isinstance(x, fx.Node)
    return x


def below(total: fx.Node) -> fx.Node:
    """What a total, and those that it adds to, sit on."""
    node: Any = total
    while adds_delta(node):
        node = node.args[0]
    assert isinstance(node, fx.Node)
    return node


def deltas_of(graph: fx.Graph) -> list[Delta]:
    """The deltas of a graph, in order; where several sit on one linear, that which was added last comes first."""
    return [_read_delta(node) for node in graph.nodes if adds_delta(node) and not _bound(node)]


def bound_deltas_of(graph: fx.Graph) -> dict[str, str]:
    """The sites whose deltas are not `scale * B A` beside a linear any more, and what they are bound to."""
    return {
        str(node.meta["site"]): bound for node in graph.nodes if adds_delta(node) and (bound := _bound(node))
    }


def free_stem(program: Program, site: str, label: str = "") -> str:
    """What the parameters of a new delta are named after; `label` tells deltas on parts of one linear apart."""
    stem = f"{site}_{label}_lora" if label else f"{site}_lora"
    count, free = 1, stem
    while f"{free}_a" in program.parameters:
        count += 1
        free = f"{stem}_{count}"
    return free


def freeze_backbone(program: Program) -> None:
    """Let nothing train but what deltas and prompts brought."""
    program.frozen = frozenset(backbone_of(program)) | {
        name for name, tensor in program.parameters.items() if not tensor.is_floating_point()
    }


def backbone_of(program: Program) -> dict[str, torch.Tensor]:
    """The parameters that no delta and no prompt brought."""
    brought: set[str] = set()
    for graph in program.graphs.values():
        brought |= {
            str(node.target)
            for node in graph.nodes
            if node.op == "get_attr" and node.meta.get("part") in (DELTA, PROMPT)
        }
    return {name: tensor for name, tensor in program.parameters.items() if name not in brought}


def rows_of(runs: Iterable[tuple[int, int]], size: int) -> torch.Tensor:
    """bool[size, 1]: which outputs lie in one of the runs of (start, stop)."""
    rows = torch.zeros(size, 1, dtype=torch.bool)
    for start, stop in runs:
        rows[start:stop] = True
    return rows


def _bound(total: fx.Node) -> str:
    """What a delta is bound to that is more than its linear; empty where it is not."""
    if stem(below(total)) != "linear":
        return "experts that each token chooses"
    change: Any = total.args[1]
    scaled = change.target is aten.mul.Tensor and isinstance(change.args[1], (int, float))
    return "" if scaled and change.args[0].target is aten.linear.default else "rows that choose their own"


def _read_delta(total: fx.Node) -> Delta:
    change: Any = total.args[1]
    high, scale = change.args
    low, b = high.args[:2]
    x, a = low.args[:2]
    dropped = x.target in DROPOUTS and x.meta.get("part") == DELTA
    return Delta(
        str(total.meta["site"]), below(total), total, a, b, float(scale), float(x.args[1]) if dropped else 0.0
    )
