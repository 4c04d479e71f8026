"""Queries and edits of an `onnx_ir` graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

DOMAIN = "com.microsoft"

SITE, PASS, NODE = "bmgraph.site", "bmgraph.pass", "bmgraph.node"
"""Metadata keys: the site of an ONNX node, the pass that made it, and the program's node that it came from."""

SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata key under which torch's exporter writes the module path of a node."""

PROVENANCE = (SITE, PASS, NODE, SCOPES)
"""Metadata keys that say where a node comes from."""


def producer(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """The node that computes a value if it is one of `operators`, else None."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in operators else None


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of a constant value; None for a computed one or a graph input."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def only_use(value: ir.Value) -> ir.Node | None:
    """The only node that reads a value; None if there are several reads or it is a graph output."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    return next(iter(uses)).node


def add_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Add an initialiser; a number is appended to `name` if it is taken."""
    unique = _unique(graph, name)
    value = ir.Value(
        name=unique, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.tensor(array, name=unique),
    )  # fmt: skip
    graph.initializers[unique] = value
    return value


def add_computed(
    graph: ir.Graph, name: str, array: Callable[[], np.ndarray], dtype: np.dtype, shape: tuple[int, ...]
) -> ir.Value:
    """Add an initialiser that is computed when the model is written, so that it takes no memory until then; a number is appended to
    `name` if it is taken."""
    unique = _unique(graph, name)
    kind = ir.DataType.from_numpy(dtype)
    tensor = ir.LazyTensor(
        lambda: ir.tensor(array(), name=unique), dtype=kind, shape=ir.Shape(shape), name=unique
    )
    value = ir.Value(name=unique, shape=ir.Shape(shape), type=ir.TensorType(kind), const_value=tensor)
    graph.initializers[unique] = value
    return value


def _unique(graph: ir.Graph, name: str) -> str:
    count, unique = 0, name
    while unique in graph.initializers:
        count += 1
        unique = f"{name}_{count}"
    return unique


def replace(graph: ir.Graph, old: Sequence[ir.Node], new: ir.Node, result: ir.Value) -> None:
    """Replace `old[-1]`, which computes `result`, by `new`, which gets the name of `result` and the provenance of `old`.

    The other nodes of `old` stay; `remove_dead` removes those without readers.
    """
    last = old[-1]
    for node in reversed(old):
        for key in PROVENANCE:
            if key in node.metadata_props:
                new.metadata_props.setdefault(key, node.metadata_props[key])
    output = new.outputs[0]
    output.shape, output.type = result.shape, result.type
    name = result.name
    graph.insert_before(last, new)
    result.replace_all_uses_with(output, replace_graph_outputs=True)
    result.name = f"{name}_before"
    output.name = name
    graph.remove(last, safe=True)


def remove_dead(graph: ir.Graph) -> int:
    """Remove nodes and initialisers that nothing reads; returns the number of nodes."""
    removed = 0
    for node in reversed(list(graph)):
        if all(not value.uses() and not value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
            removed += 1
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
    return removed
