"""Running a program with an eye on its nodes: values are seen one at a time and let go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from bmgraph.ir.eval_form import eval_form, set_device
from bmgraph.ir.input_check import check_inputs
from bmgraph.ir.program import FORWARD, Program, copy_graph

Visit = Callable[[str, torch.Tensor], None]
"""Called with a node's name and its value."""


class Observed:
    """The eval form of a program, run node by node; `visit` is called for the nodes named."""

    def __init__(self, program: Program) -> None:
        self._program = program
        graph = copy_graph(program.graphs[FORWARD])
        eval_form(graph, len(program.outputs))
        set_device(graph, program.device)
        self.names = {node.name for node in graph.nodes}
        tensors = program.tensors()
        used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        self._module = fx.GraphModule({name: tensors[name] for name in used}, graph)

    def run(self, batch: Mapping[str, object], names: set[str], visit: Visit) -> dict[str, torch.Tensor]:
        """The outputs on one batch. Values are visited as soon as they are computed; none is kept after its last use."""
        checked = check_inputs(self._program.inputs, self._program.ranges, batch)
        with torch.no_grad():
            values = _Visiting(self._module, names, visit).run(*checked.values())
        return dict(zip((spec.name for spec in self._program.outputs), values))


class _Visiting(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, names: set[str], visit: Visit) -> None:
        super().__init__(module)
        self.extra_traceback = False  # it would be added to the messages of our own errors
        self._names = names
        self._visit = visit

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self._names and isinstance(result, torch.Tensor):
            self._visit(n.name, result)
        return result


def evaluate(program: Program, node: fx.Node) -> torch.Tensor:
    """The value of an expression of parameters and buffers alone, such as a quantised weight."""
    known: dict[fx.Node, Any] = {}

    def value(item: fx.Node) -> Any:
        if item not in known:
            if item.op == "get_attr":
                known[item] = program.tensor(str(item.target))
            else:
                assert item.op == "call_function", f"{item} depends on an input"
                assert callable(item.target)
                known[item] = item.target(
                    *fx.map_arg(item.args, value), **dict(fx.map_arg(item.kwargs, value))
                )
        return known[item]

    with torch.no_grad():
        result = value(node)
    assert isinstance(result, torch.Tensor)
    return result


def of_parameters_alone(node: fx.Node) -> bool:
    """Whether an expression reads parameters and buffers and no input."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        item = stack.pop()
        if item in seen:
            continue
        if item.op == "placeholder":
            return False
        seen.add(item)
        stack.extend(item.all_input_nodes)
    return True
