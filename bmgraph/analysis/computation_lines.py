"""Writes down what a captured program computes with its weights, as text that says nothing of its inputs.

Two captures of one model differ in much that is not the model: labels and a loss, a mask that is given or made, dynamic
or fixed sizes, training or eval form, layout. Two models with equal weights differ in what stands between weights: the
activation, the number of heads, a scale, tables such as rotary frequencies. So one line is written for each call that reads
a weight: its operator, its numbers, and the expression of its input back to the calls that read other weights. Left out are
layout, casts, dropout, masks, and whatever is computed from inputs alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.structure.value_origins import SCALARS, stem
from bmgraph.ir.computation import Computation
from bmgraph.ir.eval_form import eval_form
from bmgraph.ir.program import Program, copy_graph
from bmgraph.ops.trait_row import Dims, Kind
from bmgraph.ops.traits import is_tagged_pointwise, traits_of
from bmgraph.utils.digest import digest, early_fingerprint
from bmgraph.utils.versions import versions

LONGEST = 400
"""An expression of more characters is written once, and referred to by its hash."""

NUMBER, WEIGHT, TABLE, INPUT, DATA = "n", "weight", "table", "in", "data"
"""What a value is computed from: sizes; parameters; buffers; inputs (and buffers, and looked-up rows); parameters and inputs."""


def computation_of(program: Program) -> Computation:
    """What a program that was just captured computes; unknown (empty) on the meta device, whose buffers have no values."""
    if program.device.type == "meta":
        return Computation()
    graph = copy_graph(program.graph)
    eval_form(graph, len(program.outputs))
    walk = _Walk(program)
    for node in graph.nodes:
        if node.op != "output":
            walk.classify(node)
    return Computation(tuple(walk.lines(graph)), versions())


@dataclass
class _Walk:
    program: Program
    kinds: dict[fx.Node, str] = field(default_factory=dict)
    tables: dict[fx.Node, frozenset[str]] = field(default_factory=dict)
    """Value -> digests of the tables that it is computed from."""
    texts: dict[fx.Node, str] = field(default_factory=dict)

    def classify(self, node: fx.Node) -> None:
        """Set what a node is computed from; those that it reads are known."""
        inputs = node.all_input_nodes
        kinds = {self.kinds[item] for item in inputs}
        self.tables[node] = frozenset[str]().union(*(self.tables[item] for item in inputs))
        if node.op == "placeholder":
            self.kinds[node] = INPUT
        elif node.op == "get_attr":
            name = str(node.target)
            self.kinds[node] = WEIGHT if name in self.program.parameters else TABLE
            tensor = self.program.tensor(name)
            if self.kinds[node] == TABLE and tensor.is_floating_point() and tensor.numel() > 1:
                self.tables[node] = frozenset({early_fingerprint({"": tensor})[:8]})
        elif isinstance(node.meta.get("val"), SCALARS):
            self.kinds[node] = NUMBER
        elif traits_of(node).kind is Kind.EMBEDDING and DATA not in kinds:
            self.kinds[node] = INPUT  # a batch may hold the rows themselves
        elif DATA in kinds or {WEIGHT, INPUT} <= kinds:
            self.kinds[node] = DATA
        elif WEIGHT in kinds:
            self.kinds[node] = WEIGHT
        else:
            self.kinds[node] = TABLE if kinds - {NUMBER} == {TABLE} else INPUT

    def lines(self, graph: fx.Graph) -> list[str]:
        """One line for each call that reads a weight, and for each value that joins several."""
        lines = []
        for node in self._written(graph):
            text = self._expression(node)
            weight = self._weight(node)
            if weight:
                lines.append(f"{weight} = {text}")
                self.texts[node] = f"{stem(node)} {weight}"
            elif len(self._operands(node)) > 1 or len(text) > LONGEST:
                self.texts[node] = f"#{digest(text)[:8]}"
                lines.append(f"{self.texts[node]} = {text}")
            else:
                self.texts[node] = text
        return lines

    def _written(self, graph: fx.Graph) -> list[fx.Node]:
        """The calls on data that a call that reads a weight depends on, in order, without those that are left out."""
        needed: set[fx.Node] = set()
        for node in reversed(graph.nodes):
            if node.op != "call_function" or self.kinds[node] != DATA or self._origin(node) is not node:
                continue
            if node in needed or self._weight(node):
                needed.add(node)
                needed |= {self._origin(item) for item in self._operands(node)}
        return [node for node in graph.nodes if node in needed]

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """The operands of a call that are data; of an attention, without its mask."""
        operands = node.args[:3] if traits_of(node).kind is Kind.ATTENTION else node.all_input_nodes
        return [item for item in operands if isinstance(item, fx.Node) and self.kinds[item] == DATA]

    def _origin(self, node: fx.Node) -> fx.Node:
        """The call that made a value, before layout, casts and masks."""
        while self._is_left_out(node):
            node = self._operands(node)[0]
        return node

    def _is_left_out(self, node: fx.Node) -> bool:
        if node.op != "call_function" or self._weight(node) or len(self._operands(node)) != 1:
            return False
        if _moves(node):
            return True
        others = [item for item in node.all_input_nodes if self.kinds[item] in (INPUT, TABLE)]
        return is_tagged_pointwise(node) and bool(others) and not any(self.tables[item] for item in others)

    def _weight(self, node: fx.Node) -> str:
        """The name of the first weight that a call on data reads; empty if it reads none."""
        if self.kinds[node] != DATA:
            return ""
        for item in node.all_input_nodes:
            while self.kinds[item] == WEIGHT:
                if item.op == "get_attr":
                    return str(item.target)
                item = next(operand for operand in item.all_input_nodes if self.kinds[operand] == WEIGHT)
        return ""

    def _expression(self, node: fx.Node) -> str:
        if traits_of(node).kind is Kind.ATTENTION:
            return self._attention(node)
        arguments = [self._argument(node, item) for item in node.args]
        arguments += [
            f"{key}={self._argument(node, item)}"
            for key, item in node.kwargs.items()
            if isinstance(item, (fx.Node, int, float))
        ]
        return f"{stem(node)}({', '.join(item for item in arguments if item)})"

    def _attention(self, node: fx.Node) -> str:
        """An attention without its mask, with its heads and the scale that it takes if none is given."""
        q, k = (item.meta["val"] for item in node.args[:2])  # type: ignore[union-attr]
        scale = node.args[6] if len(node.args) > 6 else node.kwargs.get("scale")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        heads = " ".join(
            f"{_size(item.shape[-3])}x{_size(item.shape[-1])}" for item in (q, k) if item.dim() > 3
        )
        operands = ", ".join(self._argument(node, item) for item in node.args[:3])
        return f"attention[{heads}]({operands}, scale={_size(scale)})"

    def _argument(self, call: fx.Node, argument: Any) -> str:
        if isinstance(argument, fx.Node):
            return self._value(call, argument)
        if isinstance(argument, (tuple, list)):
            return f"[{', '.join(self._argument(call, item) for item in argument)}]"
        if isinstance(argument, torch.dtype):
            return ""
        return _size(argument)

    def _value(self, call: fx.Node, node: fx.Node) -> str:
        kind = self.kinds[node]
        if kind == DATA:
            origin = self._origin(node)
            return self.texts.get(origin) or stem(origin)
        if kind == WEIGHT:
            return str(node.target) if node.op == "get_attr" else self._weights_text(node)
        moving = bool(traits_of(call).writes)
        return " ".join([kind, *([] if moving else sorted(self.tables[node]))])

    def _weights_text(self, node: fx.Node) -> str:
        """An expression of weights alone, such as a transposed or normalised one."""
        operands = [item for item in node.all_input_nodes if self.kinds[item] in (WEIGHT, TABLE)]
        text = ", ".join(self._value(node, item) for item in operands)
        return text if _moves(node) and len(operands) == 1 else f"{stem(node)}({text})"


def _moves(node: fx.Node) -> bool:
    """Whether a call only moves elements, or changes their type."""
    row = traits_of(node)
    if row.kind in (Kind.LAYOUT, Kind.SELECTION):
        return row.traced and row.dims is not Dims.PADDED
    return row.kind in (Kind.RESHAPE, Kind.CAST)


def _size(value: Any) -> str:
    """A number as text; "n" for a dynamic one."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return "n" if isinstance(value, (torch.SymInt, torch.SymFloat)) or value is None else str(value)
