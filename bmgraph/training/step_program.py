"""The data structure of a step: its graph, its tensors and their places, with methods to edit and print it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from bmgraph.distributed.process_group import Ranks
from bmgraph.ir.pass_record import Record
from bmgraph.ir.printer import argument_text, numbered, target_text, value_text
from bmgraph.ir.program import Program, output_node
from bmgraph.ir.shape_inference import carry, infer
from bmgraph.training.placement import Place, Update
from bmgraph.training.row_axes import RowAxes
from bmgraph.utils.torch_internals import fake_mode_of

if TYPE_CHECKING:
    from bmgraph.training.evaluation_graph import EvaluationSource
    from bmgraph.training.weighted_terms import LossCounts

TENSOR = "tensor"
"""Metadata key of a placeholder: the name of its parameter, buffer or shard."""

CONSTANT = "(loss)."
"""Begins the names of tensors that belong to the loss function, and not to the program."""


WHOLE = "whole"
"""Every rank gives the whole batch to a trainer's `step`; with "rank" each gives rows of its own."""


@dataclass(eq=False)
class StepProgram:
    """Forward, loss and backward of a program in one FX graph, and how its tensors are then updated.

    A step has two phases. The **gradient phase** is the graph. Its arguments are the inputs in order, then the tensors in the
    order of `reads()`. It returns the summed loss, the number of items in the sum, the gradient of the summed loss for each
    of `trained`, and the new values of `writes`. Batch norms update their running statistics in place.

    The **update phase** (`update_phase.py`) divides the gradients by the number of items, clips them, applies the
    optimizer's rule where the state of each tensor lives, and brings the new values back to where the graph reads them. It
    is data, `places` and `updates`, and no graph: what has to move follows from the places alone, so a pass that shards or
    offloads the optimizer changes a place, and cannot forget a copy. Between the phases all ranks agree that the numbers are
    finite, so that what fails changes nothing; several runs of the gradient phase may come before one update.
    """

    graph: fx.Graph
    outline: Program
    """The traced program, with its tensors on `meta`."""
    tensors: dict[str, torch.Tensor]
    """All parameters and buffers by name, or the flat tensors that hold them. Besides them, under `CONSTANT`, the tensors
    that the loss function made or read by itself."""
    places: dict[str, Place]
    """By name in `tensors`: which parameters the tensor holds, and what of them this rank has."""
    updates: dict[str, Update]
    """The update phase, by name of the trained tensor, in the order of the returned gradients."""
    masters: dict[str, torch.Tensor] = field(default_factory=dict)
    """By name of a trained tensor: its value as the optimizer moves it, in the place of its state. A pass that stores a value
    in a lower precision keeps the value of before here; without one, a master that is needed is made of the value."""
    writes: tuple[str, ...] = ()
    """The names of the buffers whose new values the graph returns, in order."""
    ranks: Ranks = field(default_factory=Ranks)
    digests: dict[str, bytes] = field(default_factory=dict)
    """sha256 of every parameter and buffer at the time of tracing (on one rank, of those that do not train); of trained ones
    that are in files, of samples."""
    rows: RowAxes = field(default_factory=lambda: RowAxes({}))
    """Where the rows of a batch lie, if there are several ranks."""
    shared: bool = False
    """Whether a pass has made all ranks work on one batch: loss and gradients are sums over the ranks."""
    moments: int = 2
    """How many moments of each trained element the optimizer keeps, for plans of memory."""
    updates_in_backward: bool = False
    """Whether each gradient is let go as soon as it is whole, for plans of memory: no micro-batch waits for another."""
    compute: torch.dtype = torch.float32
    """The dtype of its products: comparisons of two steps allow for its rounding."""
    computation: str = ""
    """What the step computes, as text that any device and number of ranks has; checkpoints compare it."""
    evaluation: EvaluationSource | None = None
    """What an evaluation of the same loss is traced from; None for a step that was not traced from a program."""
    counts: LossCounts | None = None
    """How the items of each term of the loss are counted before the graph runs, if it has several terms."""
    gathered: tuple[str, ...] = ()
    """The outputs and inputs of which the loss reads the rows of all ranks: these have equally many then."""
    by_part: tuple[str, ...] = ()
    """The terms of the loss that each rank and micro-batch computes by itself, in words."""
    history: tuple[Record, ...] = ()
    """The records of the passes of the step stage, in order."""

    @property
    def graphs(self) -> dict[str, fx.Graph]:
        """The graph by name, as programs have theirs."""
        return {"step": self.graph}

    @property
    def device(self) -> torch.device:
        """The device that the step runs on."""
        return next(iter(self.tensors.values())).device

    @property
    def trained(self) -> tuple[str, ...]:
        """The names of the tensors with a gradient, in the order of the returned gradients."""
        return tuple(self.updates)

    @property
    def trained_parameters(self) -> set[str]:
        """The parameters in `trained`, as whole tensors or in shards."""
        return {part for name in self.trained for part in self.places[name].names}

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer's state on the device: moments, and masters that are copies."""
        total = 0
        for name, update in self.updates.items():
            if update.state.device.type == self.device.type and not update.state.folder:
                copied = update.state.dtype != self.places[name].dtype
                total += update.state.nbytes * (self.moments + copied)
        return total

    def reads(self) -> dict[str, fx.Node]:
        """The placeholders of the tensors that the graph reads, by name of the tensor."""
        return {str(node.meta[TENSOR]): node for node in self.graph.nodes if TENSOR in node.meta}

    def gradients(self) -> dict[str, fx.Node]:
        """The nodes of the returned gradients, by name of the trained tensor."""
        return dict(zip(self.trained, self.returned()[2:]))

    def returned(self) -> tuple[fx.Node, ...]:
        """The nodes that the graph returns."""
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
        """Insert a call before a node, with the metadata of `like` (module path, stack trace)."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        if like is not None:
            carry(like, node)
        mode = fake_mode_of(list(self.graph.nodes))
        assert mode is not None
        infer(node, mode, self.device)
        return node

    def placeholder(self, name: str) -> fx.Node:
        """Let the graph read one more of the step's tensors; its placeholder comes after the existing ones."""
        tensor = self.tensors[name]
        last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder("shard")
        node.target = node.name  # the graph makes names unique, generated code uses targets
        node.meta[TENSOR] = name
        mode = fake_mode_of(list(self.graph.nodes))
        assert mode is not None
        with mode:
            node.meta["val"] = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
            )
        return node

    def digest(self) -> bytes:
        """sha256 of the text of the step, which ranks compare."""
        return hashlib.sha256(str(self).encode()).digest()

    def __str__(self) -> str:
        return _step_text(self)


def _step_text(step: StepProgram) -> str:
    """One line for each placeholder and call, then the results with their labels, and one for each update."""
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
    results = [f"{label}={argument_text(item, names)}" for label, item in zip(labels, step.returned())]
    lines.append(f"  return {', '.join(results)}")
    for name, update in step.updates.items():
        value = step.places[name]
        file = " in a file" if update.state.folder else ""
        away = file if update.state.device.type == value.device.type else f" on {update.state.device.type}"
        lines.append(
            f"  update {name}: value {value}, gradient {update.gradient}, state {update.state}{away}"
        )
    return "\n".join(lines) + "\n"
