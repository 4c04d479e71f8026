"""Runs a program node by node and shows chosen intermediate values to a callback."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from bmgraph.ir.eval_form import eval_form, set_device
from bmgraph.ir.evaluation import COMPUTED, GraphRunner, Visit, upstream, value_of
from bmgraph.ir.input_check import check_inputs
from bmgraph.ir.program import Program, copy_graph


class Observed:
    """Runs the eval form of a program and calls `visit` with the values of chosen nodes.

    `names` holds the names of all nodes that can be visited. Later edits of the program are not seen.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        graph = copy_graph(program.graph)
        eval_form(graph, len(program.outputs))
        set_device(graph, program.device)
        self.names = {node.name for node in graph.nodes}
        self._graph, self._tensors = graph, program.tensors()

    def run(self, batch: Mapping[str, object], names: set[str], visit: Visit) -> dict[str, torch.Tensor]:
        """Return the outputs on one batch; call `visit` for each node in `names` as soon as its value is computed.

        No value is kept after its last use. Raises InputError for a batch that does not fit the program.
        """
        with torch.no_grad():
            return self._run(batch, names, visit)

    def gradients(
        self, batch: Mapping[str, object], names: set[str], output: str
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """For the nodes in `names`, the value on one batch and the gradient of a scalar output by it; zero where that does not
        depend on it. Raises InputError for a batch that does not fit the program."""
        seen: dict[str, torch.Tensor] = {}

        def visit(name: str, value: torch.Tensor) -> None:
            seen[name] = value if value.requires_grad else value.requires_grad_()

        with torch.enable_grad():
            total = self._run(batch, names, visit)[output]
        found = torch.autograd.grad(total, list(seen.values()), allow_unused=True)
        return {
            name: (value.detach(), torch.zeros_like(value) if gradient is None else gradient)
            for (name, value), gradient in zip(seen.items(), found)
        }

    def _run(self, batch: Mapping[str, object], names: set[str], visit: Visit) -> dict[str, torch.Tensor]:
        program = self._program
        inputs = check_inputs(program.inputs, program.ranges, batch, program.ignored, program.cache)
        values = GraphRunner(self._graph, self._tensors, frozenset(names), visit).run(*inputs.values())
        return dict(zip((spec.name for spec in self._program.outputs), values))


def evaluate(program: Program, node: fx.Node) -> torch.Tensor:
    """The value of an expression that reads only parameters and buffers, such as a dequantized weight."""

    def leaf(item: fx.Node) -> Any:
        if item.op == "get_attr":
            return program.tensor(str(item.target))
        assert item.op == "call_function", f"{item} depends on an input"
        return COMPUTED

    with torch.no_grad():
        result = value_of(node, leaf)
    assert isinstance(result, torch.Tensor)
    return result


def read_by(calls: Iterable[fx.Node]) -> list[str]:
    """The tensors that calls read after their first argument: weights and biases, behind any expression."""
    nodes = [item for call in calls for argument in call.args[1:] for item in _nodes(argument)]
    found = [item for node in nodes if reads_no_input(node) for item in upstream(node)]
    return list(dict.fromkeys(str(item.target) for item in found if item.op == "get_attr"))


def _nodes(argument: Any) -> list[fx.Node]:
    return [argument] if isinstance(argument, fx.Node) else []


def reads_no_input(node: fx.Node) -> bool:
    """Whether an expression reads only parameters and buffers, and no input of the program."""
    return all(item.op != "placeholder" for item in upstream(node))
