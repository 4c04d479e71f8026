"""Assemble the joint graph of forward and backward from the traces of its calls."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from bmgraph.training.call_gradients import (
    SYMBOLIC,
    Call,
    CallTrace,
    Value,
    kind_of,
    leaves,
    replaced,
    trace_call,
)
from bmgraph.training.size_nodes import SizeNodes
from bmgraph.utils.graph_copies import copy_node
from bmgraph.utils.torch_internals import FakeTensorMode, forgetting_new_sizes


class CallTraces:
    """The traces of all kinds of calls, each made once."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._results: dict[Any, Any] = {}
        self._traces: dict[Any, CallTrace] = {}

    def evaluate(self, call: Call, known: set[Any]) -> None:
        """Set what a call returns. Calls of a kind share fake results, unless these have sizes that are not `known`, such as
        the number of items that a mask selects: those are the call's own."""
        found = self._results.get(call.kind)
        if found is None:
            with forgetting_new_sizes(self._mode):
                found = call.on(call.inputs())
            symbols = {symbol for leaf in leaves(found, _LEAVES) for symbol in _symbols(leaf)}
            if symbols <= known:
                self._results[call.kind] = found
            else:
                known |= symbols
                call.kind = (*call.kind, id(call))
        call.result = replaced(found, _LEAVES, Value)

    def trace(self, call: Call, gradients: Mapping[int, Value]) -> CallTrace:
        """The trace of a call with gradients, as `trace_call` takes them."""
        kind = (call.kind, *((place, kind_of(value)) for place, value in gradients.items()))
        if kind not in self._traces:
            self._traces[kind] = trace_call(call, {place: value.fake for place, value in gradients.items()})
        return self._traces[kind]


_LEAVES = (torch.Tensor, *SYMBOLIC)


def _symbols(leaf: Any) -> set[Any]:
    sizes = leaf.shape if isinstance(leaf, torch.Tensor) else (leaf,)
    return {symbol for size in sizes if isinstance(size, SYMBOLIC) for symbol in size.node.expr.free_symbols}


@dataclass
class _Traced:
    """A call with its trace, the gradients that this was traced with, and those that it makes, by value."""

    call: Call
    trace: CallTrace
    given: list[Value]
    made: list[tuple[Value, fx.Node]]
    nodes: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """The nodes of the trace and their copies in the joint graph."""


class JointAssembly:
    """Calls on values, and the graph that computes them and the gradients of a sum.

    Inputs and tensors are placed first (`place`), then calls are added in order (`add`), then the graph is written
    (`finish`). Gradients are summed in the order of autograd: that of a later call is the first term.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self.graph = fx.Graph()
        self.constants: dict[str, torch.Tensor] = {}
        """Tensors that calls made of numbers, or read besides their arguments, by name."""
        self._sizes = SizeNodes(self.graph)
        self._traces = CallTraces(mode)
        self._known: set[Any] = set()
        self._calls: list[Call] = []

    def place(self, name: str, fake: Any) -> Value:
        """A value that the graph is given, in a placeholder."""
        node = self.graph.placeholder(name)
        node.meta["val"] = fake
        value = Value(fake, node)
        self._sizes.take(value)
        self._known |= _symbols(fake)
        return value

    def add(self, target: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """What a call returns, in values."""
        if target is operator.getitem and isinstance(args[0], (list, tuple)):
            return args[0][args[1]]
        call = Call(target, args, kwargs)
        self._traces.evaluate(call, self._known)
        self._calls.append(call)
        return call.result

    def run(self, graph: fx.Graph, inputs: Iterable[Value], tensors: Mapping[str, Value]) -> Any:
        """What a graph returns for its inputs in order and its tensors by name, in values."""
        given = iter(inputs)
        values: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            arguments: Any = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "get_attr":
                values[node] = tensors[str(node.target)]
            elif node.op == "call_function":
                values[node] = self.add(node.target, arguments[0], dict(arguments[1]))
            else:
                return arguments[0][0]
        raise AssertionError("a graph without an output")

    def finish(self, total: Value, trained: Iterable[Value]) -> list[Value | None]:
        """Write the graph but for its output; returns the gradient of `total` for each of `trained`, None if it has none."""
        seed = Call(torch.ones_like, (total,), {"memory_format": torch.preserve_format})
        self._traces.evaluate(seed, self._known)
        gradients: dict[Value, Value] = {total: seed.returns[0]}
        backward = [self._derive(call, gradients) for call in reversed(self._calls)]
        for traced in reversed(backward):
            self._write(traced, forward=True)
        begin = _Traced(seed, self._traces.trace(seed, {}), [], [])
        self._write(begin, forward=True)
        for traced in backward:
            self._write(traced, forward=False)
        return [gradients.get(value) for value in trained]

    def number(self, value: Value) -> Any:
        """The node of a value; that of a symbolic number is made here."""
        return self._sizes.node(value.fake) if isinstance(value.fake, SYMBOLIC) else value.node

    def _derive(self, call: Call, gradients: dict[Value, Value]) -> _Traced:
        """Trace a call with the gradients of what it returns, and put those of what it reads into `gradients`."""
        given = {
            place: gradients[value]
            for place, value in enumerate([*call.reads, *call.returns])
            if value in gradients and value.trains
        }
        if not any(place >= len(call.reads) for place in given):
            given = {}
        trace = self._traces.trace(call, given)
        made = []
        for value, node in zip(call.reads, trace.gradients):
            if node is not None:
                gradients[value] = Value(node.meta["val"])
                made.append((gradients[value], node))
        return _Traced(call, trace, list(given.values()), made)

    def _write(self, traced: _Traced, forward: bool) -> None:
        """Copy the nodes of a trace's forward or backward into the graph."""
        call, trace = traced.call, traced.trace
        arguments = [node for node in trace.module.graph.nodes if node.op == "placeholder"]
        for node, value in zip(arguments, [*call.reads, *traced.given]):
            if value.node is not None:
                traced.nodes[node] = value.node
        for node in trace.module.graph.nodes:
            if (node.name in trace.forward) is forward and node.op in ("call_function", "get_attr"):
                self._copy(node, traced)
        if not forward:
            for value, node in traced.made:
                value.node = self._copied(node, traced)
            return
        for value, node in zip(call.returns, trace.returned):
            if not isinstance(value.fake, SYMBOLIC) or not self._sizes.knows(value.fake):
                value.node = self._copied(node, traced)
                self._sizes.take(value)

    def _copy(self, node: fx.Node, traced: _Traced) -> None:
        number = node.meta.get("val")
        if isinstance(number, SYMBOLIC) and self._sizes.knows(number):
            return  # it is made from the sizes of inputs where it is read, and keeps no tensor alive
        if node.op == "get_attr":
            traced.nodes[node] = self._constant(node, traced.trace.module)
        else:
            traced.nodes[node] = copy_node(self.graph, node, lambda old: self._copied(old, traced))

    def _copied(self, node: fx.Node, traced: _Traced) -> Any:
        number = node.meta.get("val")
        if isinstance(number, SYMBOLIC) and node not in traced.nodes:
            return self._sizes.node(number)
        return traced.nodes[node]

    def _constant(self, node: fx.Node, module: fx.GraphModule) -> fx.Node:
        """The node of a constant of a trace."""
        tensor, name, number = getattr(module, str(node.target)), str(node.target), 0
        while self.constants.setdefault(name, tensor) is not tensor:
            number += 1
            name = f"{str(node.target).rstrip('0123456789')}{number}"
        copy = self.graph.create_node("get_attr", name)
        copy.meta["val"] = node.meta["val"]
        return copy
