"""Calls within a step graph that take each gradient as soon as it is whole, so that it need not be kept until the graph ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from bmgraph.ir.program import output_node
from bmgraph.training.collectives import COLLECTIVES
from bmgraph.training.step_program import TENSOR

aten = torch.ops.aten

Taken = Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""(name of a trained tensor, its summed gradient, the summed loss, the number of items): takes a gradient."""


def take_gradients(graph: fx.Graph, trained: Sequence[str], taken: Taken) -> None:
    """Let `taken` have the gradient of each trained tensor, instead of returning it; in place.

    It is called when the gradient, the loss and the number of items are there, and when no later call reads the tensor: so
    it may change the tensor.
    """

    def take_gradient(
        name: str, gradient: torch.Tensor, loss: torch.Tensor, count: torch.Tensor
    ) -> None:  # a module's name for it must be a function
        taken(name, gradient, loss, count)

    order = {node: index for index, node in enumerate(graph.nodes)}
    output = output_node(graph)
    returned = list(output.args[0])  # type: ignore[arg-type]
    loss, count = returned[:2]
    reads = {node.meta[TENSOR]: node for node in graph.nodes if TENSOR in node.meta}
    for place, name in enumerate(trained, 2):
        gradient = returned[place]
        read = _last_readers(reads[name]) if name in reads else []
        last = max([gradient, loss, count, *read], key=order.__getitem__)
        while last.next.op == "placeholder":
            last = last.next
        with graph.inserting_after(last):
            graph.call_function(take_gradient, (name, gradient, loss, count))
        returned[place] = None
    output.args = (tuple(returned),)


def _last_readers(tensor: fx.Node) -> list[fx.Node]:
    """The calls that read a tensor or what shares its memory; of a collective, what awaits it."""
    found: dict[fx.Node, None] = {}
    stack = [tensor]
    while stack:
        node = stack.pop()
        for user in node.users:
            if user.op != "call_function" or user in found:
                continue
            found[user] = None
            if getattr(user.target, "namespace", None) == COLLECTIVES:
                found |= dict.fromkeys(item for item in user.users if item.op == "call_function")
            elif _shares_memory(user):
                stack.append(user)
    return list(found)


def _shares_memory(node: fx.Node) -> bool:
    """Whether the result of a call may lie in the memory of an argument."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    returns = node.target._schema.returns
    return node.target is aten._unsafe_view.default or any(item.alias_info is not None for item in returns)
