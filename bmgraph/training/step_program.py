"""One training step as data: forward, loss and backward of a program in one graph."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from bmgraph.distributed.process_group import Ranks
from bmgraph.ir.printer import argument_text, numbered, target_text, value_text
from bmgraph.ir.program import Program, output_node
from bmgraph.ir.shape_inference import carry, infer
from bmgraph.training.shard_layout import Flat
from bmgraph.utils.digest import digest
from bmgraph.utils.torch_internals import fake_mode_of

TENSOR = "tensor"
"""The key of a placeholder's metadata that holds the name of the parameter, buffer or shard that it stands for."""


@dataclass(eq=False)
class StepProgram:
    """Forward, loss and backward in one FX graph.

    The graph takes the inputs in order, then the `tensors` in order; it returns the summed loss, the count of items
    that it is the sum of, the gradient of the summed loss for each of `trained`, and the new values of `writes`.
    Batch-norm calls write the buffers that they are given in place.
    """

    graph: fx.Graph
    outline: Program
    """The program that the step was made of, with its tensors on `meta`."""
    tensors: dict[str, torch.Tensor]
    """What the step reads besides its inputs: parameters and buffers, or shards of parameters."""
    trained: tuple[str, ...]
    """Those of `tensors` that have a gradient, in the order in which it is returned."""
    writes: tuple[str, ...] = ()
    """Buffers whose new values the graph returns, in order."""
    layouts: dict[str, Flat] = field(default_factory=dict)
    """For a tensor that is a rank's share of parameters: where they lie."""
    ranks: Ranks = field(default_factory=Ranks)
    digests: dict[str, bytes] = field(default_factory=dict)
    """sha256 of every parameter and buffer that the step was made with."""

    @property
    def device(self) -> torch.device:
        """Where the step runs."""
        return next(iter(self.tensors.values())).device

    @property
    def shared(self) -> bool:
        """Whether a pass has said how ranks share the step."""
        return bool(self.layouts)

    @property
    def trained_parameters(self) -> set[str]:
        """The parameters that `trained` tensors are, or hold."""
        return {part for name in self.trained for part in self.parts(name)}

    def parts(self, name: str) -> tuple[str, ...]:
        """The parameters that one of `tensors` holds: itself where it is no rank's share."""
        layout = self.layouts.get(name)
        return (name,) if layout is None else tuple(piece.name for piece in layout.pieces)

    def reads(self) -> dict[str, fx.Node]:
        """The placeholders of the tensors, by the tensors' names."""
        return {str(node.meta[TENSOR]): node for node in self.graph.nodes if TENSOR in node.meta}

    def gradients(self) -> dict[str, fx.Node]:
        """What is returned as the gradient of each trained tensor."""
        return dict(zip(self.trained, self.returned()[2:]))

    def returned(self) -> tuple[fx.Node, ...]:
        """All that the graph returns."""
        values: Any = output_node(self.graph).args[0]
        return tuple(values)

    def call(
        self,
        target: Callable[..., Any],
        *args: Any,
        before: fx.Node,
        like: fx.Node | None = None,
        **kwargs: Any,
    ) -> fx.Node:
        """A new call in front of a node; it takes its place in the model from `like`."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        if like is not None:
            carry(like, node)
        mode = fake_mode_of(list(self.graph.nodes))
        assert mode is not None
        infer(node, mode, self.device)
        return node

    def placeholder(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """A new tensor that the step reads, after those that it has."""
        last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder("shard")
        node.target = node.name  # the graph makes its name unique, and code takes placeholders by target
        node.meta[TENSOR] = name
        mode = fake_mode_of(list(self.graph.nodes))
        assert mode is not None
        with mode:
            node.meta["val"] = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
            )
        self.tensors[name] = tensor
        return node

    def whole(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parameters that a tensor laid out like `tensors[name]` holds, by their names; collective."""
        layout = self.layouts.get(name)
        return {name: tensor} if layout is None else layout.join(self.ranks.gather(tensor))

    def share(self, name: str, value: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """A copy of what this rank holds as `tensors[name]`, of whole parameters that `value` gives by name."""
        layout, like = self.layouts.get(name), self.tensors[name]
        if layout is None:
            return value(name).to(like.device).clone()
        return layout.cut(self.ranks.rank, value, like.device)

    def digest(self) -> bytes:
        """sha256 of the graph as text, which ranks compare."""
        return hashlib.sha256(str(self).encode()).digest()

    def __str__(self) -> str:
        return _step_text(self)


def digests_of(program: Program) -> dict[str, bytes]:
    """sha256 of every parameter and buffer, by name."""
    return {name: bytes.fromhex(digest(tensor)) for name, tensor in program.tensors().items()}


def _step_text(step: StepProgram) -> str:
    names: dict[fx.Node, str] = {}
    counts: dict[str, int] = {}
    lines = ["step:"]
    for node in step.graph.nodes:
        if node.op == "placeholder":
            names[node] = str(node.meta[TENSOR]) if TENSOR in node.meta else f"%{node.target}"
            kind = "trained" if names[node] in step.trained else "frozen" if TENSOR in node.meta else "input"
            lines.append(f"  {kind} {names[node]}{value_text(step.outline, node)}")
        elif node.op == "call_function":
            names[node] = numbered(node, counts)
            arguments = [argument_text(argument, names) for argument in node.args]
            arguments += [f"{key}={argument_text(item, names)}" for key, item in node.kwargs.items()]
            lines.append(
                f"  {names[node]} = {target_text(node.target)}({', '.join(arguments)}){value_text(step.outline, node)}"
            )
    labels = [
        "loss",
        "count",
        *(f"d {name}" for name in step.trained),
        *(f"{name} <-" for name in step.writes),
    ]
    given = [f"{label}={argument_text(item, names)}" for label, item in zip(labels, step.returned())]
    return "\n".join([*lines, f"  return {', '.join(given)}"]) + "\n"
