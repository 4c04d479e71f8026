"""Gives what a program computes of positions and masks some positions more in front, for the keys of a prefix.

Values that are made of tokens keep their size. What is made of positions, masks and ids alone is computed again for all n + S
positions by the model's own expressions, so that rotary angles, learned positions, distance biases and windows come right without
being known; where it meets values of tokens, the rows of the text are taken.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.structure.value_origins import walk
from bmgraph.analysis.token_values import TokenValues, ids_of, is_size
from bmgraph.deltas.inserted_values import ordinary_id
from bmgraph.errors import PassError
from bmgraph.ir.editor import Editor
from bmgraph.ir.input_kind import InputKind
from bmgraph.ir.matching import END
from bmgraph.ir.node_role import KEY, NodeRole
from bmgraph.ir.shape_inference import expression
from bmgraph.ops.trait_row import Dims
from bmgraph.ops.traits import traits_of

aten = torch.ops.aten

FILLS = {InputKind.MASK: 1, InputKind.INVERSE_MASK: 0}
"""Kind of an input -> its value at positions of a prefix."""


class LongerPositions:
    """Copies of the values of positions with `count` positions more in front, made when they are asked for.

    `RowPositions` is the same for rows of which each has other positions in front.
    """

    def __init__(self, editor: Editor, tokens: TokenValues, count: int) -> None:
        self.editor, self.tokens, self.count = editor, tokens, count
        self._made: dict[fx.Node, fx.Node] = {}
        self._of_text: dict[tuple[fx.Node, bool], fx.Node] = {}
        self._total: fx.Node | None = None
        self._causal: fx.Node | None = None
        self.graph = editor.graph
        self._first = next(node for node in self.graph.nodes if node.op == "call_function")
        self._affected, self._positional = _affected(self.graph, tokens)

    def insert(self, target: Any, *args: Any, like: fx.Node) -> fx.Node:
        """Add a call before `like` that belongs to the prefix."""
        return self._mine(self.editor.call(target, *args, like=like, part=NodeRole.PREFIX))

    def _mine(self, node: fx.Node) -> fx.Node:
        node.meta["site"], node.meta[KEY] = str(self.tokens.source.target), NodeRole.PREFIX
        return node

    def at_start(self, target: Any, *args: Any) -> fx.Node:
        """Add a call at the start of the graph that belongs to the prefix."""
        made = self.editor.call(
            target, *args, like=self.tokens.source, before=self._first, part=NodeRole.PREFIX
        )
        return self._mine(made)

    def matters(self, node: fx.Node) -> bool:
        """Whether a value of the text's positions is another one behind a prefix: it depends on positions."""
        return node in self._positional

    def longer(self, node: fx.Node) -> fx.Node:
        """A value of positions for all n + S positions; the node itself where it does not run along the sequence.

        Raises PassError for a value that depends on tokens, and for an input whose values at a prefix are not known.
        """
        if node in self.tokens.values:
            raise PassError(
                f"in {_where(node)} a mask or positions are computed from what the layers make of tokens"
            )
        if node not in self._affected:
            return node
        if node not in self._made:
            if node.op == "placeholder":
                self._made[node] = self._input(node)
            elif is_size(node):
                self._made[node] = self._size(node)
            else:
                self._made[node] = self._copy(node)
        return self._made[node]

    def copied(self, node: fx.Node, replaced: dict[fx.Node, fx.Node], before: fx.Node) -> fx.Node:
        """A copy of a call on other values, whose sizes count all n + S positions."""

        def argument(item: fx.Node) -> fx.Node:
            if item in replaced:
                return replaced[item]
            return self.longer(item) if is_size(item) else item

        target: Any = node.target
        args: Any = fx.map_arg(node.args, argument)
        kwargs: Any = fx.map_arg(node.kwargs, argument)
        return self.editor.call(target, *args, like=node, before=before, named=node.name, **kwargs)

    def of_text(self, node: fx.Node, like: fx.Node, keep_last: bool = False) -> fx.Node:
        """A value for all n + S positions, cut to the text's on each axis along the sequence; on the last one not if it is
        that of keys (`keep_last`). `like` is the first call that reads it."""
        if (node, keep_last) in self._of_text:
            return self._of_text[node, keep_last]
        axes = self.tokens.axes(node)
        value, last = self.longer(node), node.meta["val"].dim() - 1
        for axis in axes:
            if not (keep_last and axis == last):
                value = self.insert(aten.slice.Tensor, value, axis, self.count, END, like=like)
        self._of_text[node, keep_last] = value
        return value

    def causal_mask(self, like: fx.Node) -> fx.Node:
        """bool[S, n + S]: the prefix, and the text's keys up to each query's own position."""
        if self._causal is None:
            keys = self.insert(aten.arange.default, self.total, like=like)
            rows = self.insert(aten.slice.Tensor, keys, 0, self.count, END, like=like)
            column = self.insert(aten.unsqueeze.default, rows, 1, like=like)
            self._causal = self.insert(aten.ge.Tensor, column, keys, like=like)
        return self._causal

    @property
    def total(self) -> fx.Node:
        """n + S."""
        if self._total is None:
            size = self.at_start(aten.sym_size.int, self.tokens.source, self.tokens.axis)
            self._total = self.at_start(operator.add, size, self.count)
        return self._total

    def _size(self, node: fx.Node) -> fx.Node:
        if expression(node.meta["val"]) == self.tokens.symbol:
            return self.total
        if node.target is aten.sym_size.int and node.args[0] in self.tokens.values:
            raise PassError(
                f"in {_where(node)} positions are flattened with other axes, so that a prefix cannot be put in front of them"
            )
        return self._copy(node)

    def _copy(self, node: fx.Node) -> fx.Node:
        target: Any = node.target
        args: Any = fx.map_arg(node.args, self.longer)
        kwargs: Any = fx.map_arg(node.kwargs, self.longer)
        return self.editor.call(target, *args, like=node, named=node.name, **kwargs)

    def _input(self, node: fx.Node) -> fx.Node:
        spec = next(spec for spec in self.editor.program.inputs if spec.name == node.target)
        if len(spec.shape) != 2 or self.tokens.inputs[node] != 1:
            raise PassError(
                f"input {spec} has more than one value per position: its values at the positions of a prefix are not known"
            )
        column = self.at_start(aten.slice.Tensor, node, 1, 0, 1)
        front, text = self.in_front(node, spec.kind, column)
        return self.at_start(aten.cat.default, [front, text], 1)

    def in_front(self, node: fx.Node, kind: InputKind | None, column: fx.Node) -> tuple[fx.Node, fx.Node]:
        """What an input holds at the positions in front, and at those of the text; `column` is its first position."""
        if kind is InputKind.POSITIONS:
            ones = self.at_start(
                aten.ones_like.default, self.at_start(aten.expand.default, column, [-1, self.count])
            )
            front = self.at_start(aten.sub.Tensor, self.at_start(aten.cumsum.default, ones, 1), 1)
            return front, self.at_start(aten.add.Tensor, node, self.count)
        if kind is InputKind.IDS:
            rows = [
                int(user.args[0].meta["val"].shape[0])  # type: ignore[union-attr]
                for user in walk(self.graph).embeddings
                if user in self.tokens.values and ids_of(user) is node
            ]
            fill: float | None = ordinary_id(self.editor.program, node, min(rows)) if rows else 0
        elif kind is InputKind.TOKEN_TYPES:
            fill = None
        elif kind in FILLS:
            fill = FILLS[kind]
        else:
            raise PassError(
                f"the values of input {str(node.target)!r} at the positions of a prefix are not known"
            )
        if fill is not None:
            value: Any = fill if node.meta["val"].is_floating_point() else int(fill)
            column = self.at_start(aten.full_like.default, column, value)
        return self.at_start(aten.expand.default, column, [-1, self.count]), node


def _affected(graph: fx.Graph, tokens: TokenValues) -> tuple[set[fx.Node], set[fx.Node]]:
    """What is not made of tokens and depends on an input along the sequence or on its size, and which of that depends on
    positions."""
    affected: set[fx.Node] = set()
    positional: set[fx.Node] = set()
    for node in graph.nodes:
        if node in tokens.values or node.op == "output":
            continue
        if node.op == "placeholder":
            if node in tokens.inputs:
                affected.add(node)
            continue
        if node.op != "call_function":
            continue
        if is_size(node):
            if tokens.symbol in getattr(expression(node.meta["val"]), "free_symbols", ()):
                affected.add(node)
            continue
        found = [item for item in node.all_input_nodes if item in affected]
        if not found:
            continue
        affected.add(node)
        along = traits_of(node).dims is Dims.ALONG and node.target is aten.cumsum.default
        if along or any(is_size(item) or item in positional or item in tokens.positions for item in found):
            positional.add(node)
    return affected, positional


def _where(node: fx.Node) -> str:
    return str(node.meta.get("scope") or node.name)
