"""Derives the eval form of a graph from its training form, the only one that a program keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

import bmgraph.ops  # noqa: F401  (registers dropout_along)
from bmgraph.ir.program import Program, copy_graph, output_node
from bmgraph.ir.shape_inference import creates_tensor
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import argument, is_random, set_argument, traits_of
from bmgraph.utils.stored_tensor import in_memory, is_too_large, to_run

aten = torch.ops.aten


def eval_form(graph: fx.Graph, outputs: int) -> None:
    """Turn a graph from training form into eval form, in place: no dropout, no batch statistics, no buffer writes.

    `outputs` is the number of returned values that come before the new values of buffers.
    """
    for node in list(graph.nodes):
        row = traits_of(node)
        if row.kind is Kind.DROPOUT:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            node.replace_all_uses_with(source)
            graph.erase_node(node)
        elif row.train and (not row.writes or has_statistics(node)):
            set_argument(node, row.train, False)
        elif row.drop and not row.train:
            set_argument(node, row.drop, 0.0)
    returned = output_node(graph)
    values = returned.args[0]
    assert isinstance(values, (tuple, list))
    returned.args = (tuple(values[:outputs]),)
    graph.eliminate_dead_code()


def has_statistics(norm: fx.Node) -> bool:
    """Whether a norm keeps running statistics; without them it takes those of its input, in eval mode too."""
    return argument(norm, traits_of(norm).writes[0]) is not None


def in_eval(node: fx.Node) -> fx.Node:
    """The node that has this node's value in eval form: skips dropout."""
    while traits_of(node).kind is Kind.DROPOUT:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


def zero_dropout(graph: fx.Graph) -> None:
    """Let a training form drop nothing, in place, so that it can be compared.

    Every dropout probability becomes 0. What draws once for many elements keeps its scale 1 / (1 - p), as the written-out
    form does where every draw says "keep".
    """
    for node in list(graph.nodes):
        if node.target is torch.ops.bmgraph.dropout_along.default:
            node.target, node.args = aten.div.Tensor, (node.args[0], 1 - float(node.args[1]))
        elif drop := traits_of(node).drop:
            set_argument(node, drop, 0.0)


def forms_agree(program: Program) -> bool:
    """Whether the training form without dropout is the eval form: nothing writes buffers, takes statistics of a batch, or
    scales what it keeps (`zero_dropout`)."""
    rows = [(node, traits_of(node)) for node in program.graph.nodes]
    return not program.writes and all(
        not row.train
        or (row.kind is Kind.DROPOUT and node.target is not torch.ops.bmgraph.dropout_along.default)
        for node, row in rows
    )


def random_calls(graph: fx.Graph) -> list[fx.Node]:
    """The calls of a graph in eval form that draw random numbers; none should be left."""
    return [node for node in graph.nodes if node.op == "call_function" and is_random(node)]


def set_device(graph: fx.Graph, device: torch.device) -> None:
    """Set the device of every call that creates a tensor without tensor arguments, in place."""
    if device.type == "cpu":
        return
    for node in graph.nodes:
        if node.op == "call_function" and creates_tensor(node):
            node.update_kwarg("device", device)


def runnable(program: Program, graph: fx.Graph, training: bool) -> nn.Module:
    """A module that runs one graph of the program; in training form it also updates the program's buffers."""
    copied = copy_graph(graph)
    if not training:
        eval_form(copied, len(program.outputs))
    set_device(copied, program.device)
    used = {str(node.target) for node in copied.nodes if node.op == "get_attr"}
    root: dict[str, Any] = {name: program.tensor(name) for name in used}
    for name in used & program.parameters.keys():
        tensor = in_memory(root[name]) if training else to_run(root[name])
        trains = training and tensor.is_floating_point() and name not in program.frozen
        if not is_too_large(tensor):
            root[name] = nn.Parameter(tensor, requires_grad=trains)
    module = fx.GraphModule(root, copied)
    if not training or not program.writes:
        return module
    return _BufferUpdates(module, program.writes, len(program.outputs))


class _BufferUpdates(nn.Module):
    """Runs a graph and copies the new values that it returns for buffers into them."""

    def __init__(self, module: fx.GraphModule, writes: tuple[str, ...], outputs: int) -> None:
        super().__init__()
        self.graph_module = module
        self._writes = writes
        self._outputs = outputs

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values: tuple[torch.Tensor, ...] = self.graph_module(*inputs)
        with torch.no_grad():
            for name, new in zip(self._writes, values[self._outputs :]):
                self.graph_module.get_buffer(name).copy_(new)
        return values[: self._outputs]
