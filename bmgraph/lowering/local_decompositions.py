"""Decompose the calls of an exported program that an exporter cannot translate, one by one."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from bmgraph.ir.program import output_node
from bmgraph.utils.torch_internals import decomposed, is_composite_view

TRANSLATED = frozenset(
    {
        torch.ops.aten.reshape.default,
        torch.ops.aten.contiguous.default, torch.ops.aten.expand_as.default, torch.ops.aten.type_as.default,
    }
)  # fmt: skip
"""Composite views that torch's exporter to ONNX translates as they are; made of others, they would compute sizes."""

RESHAPES = frozenset({torch.ops.aten.flatten.using_ints, torch.ops.aten.unflatten.int})
"""Calls that a reshape stands for."""


class LocallyDecomposed(ExportedProgram):
    """An exported program that decomposes the calls that a table names, one by one.

    torch would trace the whole graph again, which takes seconds for a model of some layers; a program in canonical form
    neither aliases nor mutates, so that nothing else is left to do.
    """

    def run_decompositions(  # type: ignore[override]
        self, decomp_table: Mapping[Any, Callable[..., Any]] | None = None, **options: Any
    ) -> ExportedProgram:
        """The program itself, with the operators that are keys of the table decomposed in place, and those that may return
        a view of their input."""
        table = decomp_table or {}
        readers = _size_readers(self.graph)
        for node in self.graph.nodes:
            if node.target in RESHAPES:
                _as_reshape(node, readers)
        calls = [
            node
            for node in self.graph.nodes
            if node.target in table or (is_composite_view(node.target) and node.target not in TRANSLATED)
        ]
        graphs = [decomposed(node, table) for node in calls]
        if decomp_table is None or not all(made is not None and _only_calls(made.graph) for made in graphs):
            whole: ExportedProgram = super().run_decompositions(decomp_table, **options)
            return whole
        for node, made in zip(calls, graphs):
            assert made is not None
            _multiply_sizes(made.graph)
            last = _inline(self.graph, node, made.graph)
            if last is not None:
                self.graph_signature.replace_all_uses(node.name, last.name)
        _read_sizes_of_inputs(self.graph, readers)
        self.graph_module.recompile()
        return self


def _size_readers(graph: fx.Graph) -> dict[Any, fx.Node]:
    """Calls that read each dynamic size from the first input that has it, by symbol; they are added to the graph."""
    readers: dict[Any, fx.Node] = {}
    arguments = [node for node in graph.nodes if node.op == "placeholder"]
    begin = next(node for node in graph.nodes if node.op != "placeholder")
    for node in arguments:
        shape = node.meta["val"].shape if isinstance(node.meta["val"], torch.Tensor) else ()
        for axis, size in enumerate(shape):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol and size.node.expr not in readers:
                with graph.inserting_before(begin):
                    reader = graph.call_function(torch.ops.aten.sym_size.int, (node, axis))
                reader.meta["val"] = size
                readers[size.node.expr] = reader
    return readers


def _read_sizes_of_inputs(graph: fx.Graph, readers: dict[Any, fx.Node]) -> None:
    """Read each dynamic size from an input, once, in place of the tensors in between."""
    for node in list(graph.nodes):
        size = node.meta.get("val")
        if node.target is torch.ops.aten.sym_size.int and isinstance(size, torch.SymInt):
            reader = readers.get(size.node.expr, node)
            if reader is not node:
                node.replace_all_uses_with(reader)
                graph.erase_node(node)
    for reader in readers.values():
        if not reader.users:
            graph.erase_node(reader)


def _as_reshape(node: fx.Node, readers: dict[Any, fx.Node]) -> None:
    """Let a call of RESHAPES name its shape by numbers and sizes of inputs, and one -1, in place, where that is enough."""
    shape: list[Any] = []
    for size in node.meta["val"].shape:
        known = size if isinstance(size, int) else readers.get(size.node.expr, -1)
        shape.append(known)
    if shape.count(-1) <= 1:
        node.target = torch.ops.aten.reshape.default
        node.args, node.kwargs = (node.args[0], shape), {}


def _only_calls(graph: fx.Graph) -> bool:
    """Whether a graph has no tensors of its own."""
    return all(node.op in ("placeholder", "call_function", "output") for node in graph.nodes)


def _multiply_sizes(graph: fx.Graph) -> None:
    """Compute each number of elements from sizes, in place: exporters do not translate `sym_numel`."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.sym_numel.default:
            with graph.inserting_before(node):
                node.replace_all_uses_with(_product_of_sizes(graph, node.args[0]))
            graph.erase_node(node)


def _product_of_sizes(graph: fx.Graph, tensor: Any) -> fx.Node:
    """The number of elements of a tensor that has a dynamic size."""
    shape = tensor.meta["val"].shape
    total: Any = prod(size for size in shape if isinstance(size, int))
    value: Any = total
    for axis, size in enumerate(shape):
        if isinstance(size, torch.SymInt):
            factor = graph.call_function(torch.ops.aten.sym_size.int, (tensor, axis))
            factor.meta["val"], value = size, value * size
            if total == 1:
                total = factor
                continue
            total = graph.call_function(operator.mul, (total, factor))
            total.meta["val"] = value
    assert isinstance(total, fx.Node)
    return total


def _inline(graph: fx.Graph, node: fx.Node, made: fx.Graph) -> fx.Node | None:
    """Replace a call by the calls of another graph, which get its module path and source line.

    Returns the node in its place; None if the call gives several values, whose readers read those of the other graph.
    """
    arguments = [item for item in made.nodes if item.op == "placeholder"]
    values: dict[fx.Node, fx.Node] = dict(zip(arguments, node.all_input_nodes))
    kept = {key: item for key, item in node.meta.items() if key != "val"}
    with graph.inserting_before(node):
        for item in made.nodes:
            if item.op == "call_function":
                values[item] = graph.node_copy(item, values.__getitem__)
                values[item].meta = {**kept, "val": item.meta["val"]}
    returned: Any = output_node(made).args[0]
    if isinstance(returned, fx.Node):
        node.replace_all_uses_with(values[returned])
        graph.erase_node(node)
        return values[returned]
    for reader in list(node.users):
        reader.replace_all_uses_with(values[returned[reader.args[1]]])
        graph.erase_node(reader)
    graph.erase_node(node)
    return None
