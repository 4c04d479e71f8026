"""Nodes of a graph for symbolic numbers, each computed once, from the sizes of the graph's inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bmgraph.training.call_gradients import SYMBOLIC, Value, expression
from bmgraph.utils.torch_internals import number_nodes


class SizeNodes:
    """The nodes by expression. A size that a call made, such as the number of items that a mask selects, is that of its
    result."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._origins: dict[Any, tuple[fx.Node, int | None]] = {}
        self._nodes: dict[Any, fx.Node] = {}

    def take(self, value: Value) -> None:
        """Let the sizes of a value that has a node, or the number that it is, be known if they were not."""
        assert value.node is not None
        shape = value.fake.shape if isinstance(value.fake, torch.Tensor) else (value.fake,)
        for axis, size in enumerate(shape):
            symbol = expression(size)
            if isinstance(size, SYMBOLIC) and symbol.is_Symbol and symbol not in self._origins:
                self._origins[symbol] = (value.node, axis if isinstance(value.fake, torch.Tensor) else None)

    def knows(self, number: Any) -> bool:
        """Whether a symbolic number follows from known sizes."""
        return all(symbol in self._origins for symbol in expression(number).free_symbols)

    def node(self, number: Any) -> fx.Node | int | float | bool:
        """The node of a known number, at the end of the graph if there is none yet; a number that is fixed itself."""
        wanted = expression(number)
        if not wanted.free_symbols:
            fixed: int | float | bool = type_of(number)(wanted)
            return fixed
        if wanted not in self._nodes:
            symbols = {symbol: self._symbol(symbol) for symbol in wanted.free_symbols}
            if wanted in symbols:
                return symbols[wanted]
            self._nodes[wanted] = number_nodes(self._graph, wanted, symbols)
        return self._nodes[wanted]

    def _symbol(self, symbol: Any) -> fx.Node:
        if symbol not in self._nodes:
            node, axis = self._origins[symbol]
            if axis is not None:
                size = node.meta["val"].shape[axis]
                node = self._graph.call_function(torch.ops.aten.sym_size.int, (node, axis))
                node.meta["val"] = size
            self._nodes[symbol] = node
        return self._nodes[symbol]


def type_of(number: Any) -> type:
    """The type of number that a symbolic one stands for."""
    return {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}[type(number)]
