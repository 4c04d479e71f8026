"""Store the weights of each expert by itself, where its product reads them out of a stack of all experts."""

from __future__ import annotations

import onnx_ir as ir

from bmgraph.backends.onnx.rewrites.graph_utils import add_constant, constant, remove_dead


def slice_experts(model: ir.Model) -> int:
    """Replace each Gather of one slice of a constant, along its first axis, by a constant, in place; returns the count.

    Kernels that read codes take constants alone; slices of small constants are folded before. Slices share the memory of their stack,
    and so does what reads the same slice.
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
