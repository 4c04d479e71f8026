"""Store the weights of each expert by itself, as its product reads them, where it takes them out of a stack of all experts."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bmgraph.backends.onnx.rewrites.graph_utils import add_constant, constant, remove_dead


def slice_experts(model: ir.Model) -> int:
    """Replace each Gather of one slice of a constant, along its first axis, by a constant, in place; returns the count.

    Kernels that read codes take constants alone; slices of small constants are folded before. Slices share the memory of their stack,
    and so does what reads the same slice. A slice that is transposed is stored so, and made when it is written.
    """
    graph, slices = model.graph, dict[tuple[ir.Value, int], ir.Value]()
    count = 0
    for node in list(graph):
        found = _slice(node)
        if found is None:
            continue
        stack, index = found
        if found not in slices:
            array = constant(stack)
            assert array is not None
            slices[found] = add_constant(graph, f"{stack.name}_{index}", array[index])
        for use in node.outputs[0].uses():
            if _turns(use.node):
                _store_turned(graph, use.node, slices[found])
        node.outputs[0].replace_all_uses_with(slices[found])
        graph.remove(node, safe=True)
        count += 1
    if count:
        remove_dead(graph)
    return count


def _slice(node: ir.Node) -> tuple[ir.Value, int] | None:
    """The constant and the number of the slice that a Gather reads; None for another node."""
    if (
        node.op_type != "Gather"
        or node.attributes.get_int("axis", 0) != 0
        or node.outputs[0].is_graph_output()
    ):
        return None
    stack, index = node.inputs
    held, at = constant(stack), constant(index)
    if stack is None or held is None or at is None or at.ndim:
        return None
    number = int(at)
    return (stack, number) if 0 <= number < len(held) else None


def _turns(node: ir.Node) -> bool:
    """Whether a node transposes a matrix, for the main graph alone."""
    made = node.outputs[0]
    return (
        node.op_type == "Transpose"
        and list(node.attributes.get_ints("perm", ())) == [1, 0]
        and not made.is_graph_output()
    )


def _store_turned(graph: ir.Graph, transpose: ir.Node, piece: ir.Value) -> None:
    """Replace a Transpose of a slice by a constant, which nothing holds in memory until it is written."""
    held = piece.const_value
    assert held is not None

    def turned() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(held.numpy().T))

    shape = ir.Shape(held.shape.numpy()[::-1])
    name = f"{piece.name}_transposed"
    value = graph.initializers.get(name)
    if value is None:
        lazy = ir.LazyTensor(turned, dtype=held.dtype, shape=shape, name=name)
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(held.dtype), const_value=lazy)
        graph.initializers[name] = value
    transpose.outputs[0].replace_all_uses_with(value)
    graph.remove(transpose, safe=True)
