"""Tracing a program's training form, its loss and its backward into one graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from bmgraph.distributed.process_group import Ranks
from bmgraph.errors import InputError
from bmgraph.ir.eval_form import set_device
from bmgraph.ir.program import Program, output_node, placeholders, tensor_nodes
from bmgraph.ir.shape_inference import fake_parameter, reset_values
from bmgraph.training.loss_terms import Loss, split_loss
from bmgraph.training.recompute_weights import rederive
from bmgraph.training.step_program import TENSOR, StepProgram, digests_of
from bmgraph.utils.torch_internals import python_dispatcher

aten = torch.ops.aten


def trace_step(program: Program, loss: str | Loss) -> StepProgram:
    """The step of a program: the sum that `loss` names or computes, and its gradient for all that trains.

    What trains are floating-point parameters that are not frozen and that the loss reaches. The step shares the
    parameters' storage and has buffers of its own. Raises InputError where the program cannot train, where `loss` is
    no mean that ranks can share, and where nothing would be trained.
    """
    if program.training:
        raise InputError(f"this program cannot train: {program.training}")
    if program.device.type == "meta":
        raise InputError("a program on the meta device has no weights to train: load them first")
    whole = _contiguous(program)
    split = split_loss(whole, loss) if isinstance(loss, str) else whole.clone()
    set_device(split.graph, split.device)
    mode = reset_values(split, split.graph)
    read = list(tensor_nodes(split.graph))
    candidates = [name for name in read if _trains(program, name)]
    fakes = {
        name: fake_parameter(split.tensor(name), mode).requires_grad_(name in candidates) for name in read
    }
    inputs = {name: node.meta["val"] for name, node in placeholders(split.graph).items()}
    reached: list[str] = []

    def step(given: list[torch.Tensor], tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        named, batch = dict(zip(read, tensors)), dict(zip(inputs, given))
        values = _Run(split.graph, named).run(*given)
        outputs, writes = values[: len(values) - len(split.writes)], values[len(values) - len(split.writes) :]
        if isinstance(loss, str):
            total, count = outputs
        else:
            total, count = _computed(loss, dict(zip((spec.name for spec in program.outputs), outputs)), batch)
        if not total.requires_grad:
            raise InputError("the loss depends on no parameter that trains: unfreeze some, or add a delta")
        slopes = torch.autograd.grad(total, [named[name] for name in candidates], allow_unused=True)
        reached[:] = [name for name, slope in zip(candidates, slopes) if slope is not None]
        return (total, count, *(slope for slope in slopes if slope is not None), *writes)

    with mode, python_dispatcher():
        traced = make_fx(step)(list(inputs.values()), list(fakes.values()))
    graph = _flat_graph(traced.graph, list(inputs), read)
    tensors = {name: whole.tensor(name) for name in (*read, *_unread(whole, read))}
    tensors |= {name: buffer.clone() for name, buffer in tensors.items() if name in program.buffers}
    outline = _outline(program)
    outline.symbols = split.symbols
    made = StepProgram(
        graph, outline, tensors, tuple(reached), program.writes, ranks=Ranks.here(), digests=digests_of(whole)
    )
    rederive(made)
    return made


def _outline(program: Program) -> Program:
    """The program without its data: tensors on `meta`, while its nodes go on saying the device that it runs on."""
    outline = program.clone()
    outline.parameters = {name: tensor.to("meta") for name, tensor in program.parameters.items()}
    outline.buffers = {name: tensor.to("meta") for name, tensor in program.buffers.items()}
    return outline


def _contiguous(program: Program) -> Program:
    """The same values laid out in order, as they will lie when they are views of something flat."""
    whole = program.clone()
    whole.parameters = {name: tensor.detach().contiguous() for name, tensor in program.parameters.items()}
    return whole


def _trains(program: Program, name: str) -> bool:
    return (
        name in program.parameters
        and name not in program.frozen
        and program.parameters[name].is_floating_point()
    )


def _unread(program: Program, read: list[str]) -> list[str]:
    """Tensors that belong to the program although the loss does not need them."""
    return [name for name in program.tensors() if name not in set(read)]


class _Run(fx.Interpreter):
    """Runs a program's graph over the tensors that it is given for its parameters."""

    def __init__(self, graph: fx.Graph, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(nn.Module(), graph=graph)
        self.extra_traceback = False
        self._tensors = tensors

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        return self._tensors[str(target)]


def _computed(
    loss: Loss, outputs: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    found: Any = loss(outputs, batch)
    sound = isinstance(found, tuple) and len(found) == 2
    if sound and all(isinstance(term, torch.Tensor) and term.dim() == 0 for term in found):
        return found[0], found[1]
    what = f"a tensor {list(found.shape)}" if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
    raise InputError(
        f"loss={getattr(loss, '__name__', loss)!r} returned {what}: return (sum, count), two scalar tensors, "
        "since ranks cannot share a mean"
    )


def _flat_graph(graph: fx.Graph, inputs: list[str], read: list[str]) -> fx.Graph:
    """The traced graph with placeholders by name, a plain tuple returned, and nothing that nobody uses.

    Sizes change by `reshape`: some kernels of backward lay out what they give otherwise than shapes without data say,
    and a `view` that was traced on those would not hold.
    """
    made = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    given = [node for node in graph.nodes if node.op == "placeholder"]
    assert len(given) == len(inputs) + len(read)
    for node, name in zip(given, inputs):
        values[node] = made.placeholder(name)
    for index, (node, name) in enumerate(zip(given[len(inputs) :], read)):
        values[node] = made.placeholder(f"tensor_{index}")
        values[node].meta[TENSOR] = name
    for node in given:
        values[node].meta["val"] = node.meta["val"]
    for node in graph.nodes:
        if node.op == "call_function":
            values[node] = made.node_copy(node, lambda old: values[old])
            if node.target is aten.view.default:
                values[node].target = aten.reshape.default
    returned: Any = output_node(graph).args[0]
    made.output(tuple(values[node] for node in returned))
    for node in reversed(list(made.nodes)):
        if not node.users and node.op == "call_function":
            made.erase_node(node)
    made.lint()
    return made
