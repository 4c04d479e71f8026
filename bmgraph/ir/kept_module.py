"""The code that runs a program's eval form, kept from call to call until the graph is edited."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from bmgraph.ir.eval_form import eval_form, set_device
from bmgraph.utils.graph_copies import copy_node
from bmgraph.utils.stored_tensor import to_run

if TYPE_CHECKING:
    from bmgraph.ir.program import Program


@dataclass(frozen=True)
class KeptModule:
    """A module that takes the inputs, then the tensors that it reads, and the state of the graph that it was made of: its
    calls, which edits replace.

    It holds no tensors of its own: it stands in reference cycles, and would keep them long after the program is gone.
    """

    calls: list[tuple[Any, ...]]
    outputs: int
    device: torch.device
    module: fx.GraphModule
    names: tuple[str, ...]

    @staticmethod
    def of(program: Program, kept: KeptModule | None) -> KeptModule:
        """The kept module if it is still that of the program; else a new one."""
        calls = _calls(program.graph)
        device, outputs = program.device, len(program.outputs)
        if kept is not None and (kept.device, kept.outputs, kept.calls) == (device, outputs, calls):
            return kept
        graph, names = _with_tensors_as_arguments(program)
        return KeptModule(calls, outputs, device, fx.GraphModule({}, graph), names)

    def run(self, program: Program, inputs: Iterable[torch.Tensor]) -> Any:
        """The outputs in order; the inputs are on the program's device."""
        return self.module(*inputs, *(to_run(program.tensor(name)) for name in self.names))


def _with_tensors_as_arguments(program: Program) -> tuple[fx.Graph, tuple[str, ...]]:
    """The eval form with an argument for each tensor that it reads, after the inputs; and the names of these tensors."""
    graph, readers = fx.Graph(), dict[str, fx.Node]()
    values: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = graph.node_copy(node)
    for node in program.graph.nodes:
        if node.op == "get_attr":
            name = str(node.target)
            if name not in readers:
                readers[name] = graph.placeholder(f"tensor_{len(readers)}")
                readers[name].target = readers[
                    name
                ].name  # unique, unlike what was asked for; the code uses targets
                readers[name].meta = dict(node.meta)
            values[node] = readers[name]
    for node in program.graph.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], values.__getitem__)).meta = dict(node.meta)
        elif node not in values:
            values[node] = copy_node(graph, node, values.__getitem__)
    eval_form(graph, len(program.outputs))
    set_device(graph, program.device)
    return graph, tuple(readers)


def _calls(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """All that an edit can change; equal parts are the same objects, so that comparing them is quick."""
    return [(node, node.target, node.args, node.kwargs) for node in graph.nodes]
