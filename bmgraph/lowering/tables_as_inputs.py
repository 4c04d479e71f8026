"""Makes inputs of tensors of a program that an engine owns and changes while it runs, such as tables of deltas."""

from __future__ import annotations

import torch

from bmgraph.ir.program import Program, tensor_nodes
from bmgraph.ir.tensor_spec import TensorSpec


def tables_as_inputs(program: Program, tables: tuple[str, ...]) -> dict[str, str]:
    """Turn parameters into inputs behind the others, in place; returns the name of each new input -> that of its parameter.

    Parameters that the entry does not read are left out. The program has one graph, as `deployed` makes it.
    """
    readers, taken = tensor_nodes(program.graph), {spec.name for spec in program.inputs}
    last = [node for node in program.graph.nodes if node.op == "placeholder"][-1]
    made: dict[str, str] = {}
    for index, table in enumerate(name for name in tables if name in readers):
        name = f"table_{index}"
        while name in taken:
            name = f"_{name}"
        with program.graph.inserting_after(last):
            node = program.graph.placeholder(name)
        node.meta = dict(readers[table].meta)
        readers[table].replace_all_uses_with(node)
        program.graph.erase_node(readers[table])
        tensor: torch.Tensor = program.parameters.pop(table)
        program.inputs = (*program.inputs, TensorSpec(name, tensor.dtype, tuple(tensor.shape)))
        made[name], last = table, node
    return made
