"""A model as data: named graphs over one set of parameters, with named inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from bmgraph.errors import InputError
from bmgraph.ir.input_check import check_inputs
from bmgraph.ir.tensor_spec import Range, TensorSpec

if TYPE_CHECKING:
    from bmgraph.analysis.structure.sites import Structure
    from bmgraph.ir.editor import Editor
    from bmgraph.ir.pass_record import Record

FORWARD = "forward"


@dataclass(eq=False)
class Program:
    """Named graphs (`forward`, ...) over ONE set of parameters and buffers.

    A graph has one placeholder for each input, one `get_attr` for each tensor that it reads, and returns the
    outputs in order, then the new values of the buffers named in `writes`. It is kept in training form (dropout
    stands as a node); what runs by default is the eval form, derived from it. Parameters are never changed in
    place, so clones share their storage.

    Example:
        >>> import torch, bmgraph as bg
        >>> program = bg.capture(torch.nn.Linear(4, 2), {"input": torch.randn(3, 4)})
        >>> program(input=torch.randn(5, 4))["output"].shape
        torch.Size([5, 2])
    """

    graphs: dict[str, fx.Graph]
    parameters: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    ranges: dict[str, Range] = field(default_factory=dict)
    """The range of every dynamic size, by its name."""
    ties: dict[str, str] = field(default_factory=dict)
    """Other names of a parameter -> the name that it is kept under."""
    writes: tuple[str, ...] = ()
    """Buffers whose new values the graph returns after its outputs, in order."""
    losses: tuple[str, ...] = ()
    """Outputs that are losses: scalars to minimise."""
    symbols: dict[Any, str] = field(default_factory=dict)
    """Symbol of the shape environment -> the name of that size."""
    example: dict[str, torch.Tensor] = field(default_factory=dict)
    """The inputs that the program was captured with: what verification compares on."""
    frozen: frozenset[str] = frozenset()
    """Parameters that training does not change."""
    training: str = ""
    """Why the program cannot train (it keeps its eval capture); empty where it can."""
    fixed: tuple[str, ...] = ()
    """Sizes that the model fixes although they were asked to be dynamic."""
    fingerprint: str = ""
    """Which weights these are (`bmgraph.utils.digest.fingerprint`): of the model as captured, kept through what approximates
    it, and taken anew by what changes it for good. Empty where it is not known."""
    encoder: Program | None = None
    """What runs once, before a decoder with a cache: its outputs are the inputs `memory_i`."""
    history: tuple[Record, ...] = ()
    """What was done to the program, pass by pass."""

    @property
    def graph(self) -> fx.Graph:
        """The main graph."""
        return self.graphs[FORWARD]

    @property
    def device(self) -> torch.device:
        """Where the tensors live; cpu for a program without any."""
        for tensor in (*self.parameters.values(), *self.buffers.values()):
            return tensor.device
        return torch.device("cpu")

    def tensor(self, name: str) -> torch.Tensor:
        """The parameter or buffer of that name (a tied name finds the one it is kept under)."""
        name = self.ties.get(name, name)
        found = self.parameters.get(name, self.buffers.get(name))
        if found is None:
            raise InputError(f"no parameter or buffer is called {name!r}")
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers by name."""
        return {**self.parameters, **self.buffers}

    def clone(self) -> Program:
        """A program of its own graphs and tables that shares the storage of all tensors."""
        return replace(
            self,
            graphs={name: copy_graph(graph) for name, graph in self.graphs.items()},
            parameters=dict(self.parameters),
            buffers=dict(self.buffers),
            ranges=dict(self.ranges),
            ties=dict(self.ties),
            symbols=dict(self.symbols),
            encoder=self.encoder and self.encoder.clone(),
            example=dict(self.example),
        )

    def to(self, device: torch.device | str) -> Program:
        """The same program with its tensors on `device`."""
        from bmgraph.ir.shape_inference import propagate

        moved = self.clone()
        moved.parameters = {name: tensor.to(device) for name, tensor in self.parameters.items()}
        moved.buffers = {name: tensor.to(device) for name, tensor in self.buffers.items()}
        moved.encoder = self.encoder and self.encoder.to(device)
        if torch.device(device).type != "meta":
            moved.example = {name: tensor.to(device) for name, tensor in self.example.items()}
        if moved.device != self.device:
            propagate(
                moved, everything=True
            )  # what is added to the graph is computed from values on the device
        return moved

    @contextmanager
    def edit(self, name: str = FORWARD, by: str = "") -> Iterator[Editor]:
        """An editor of one graph: what it adds carries its metadata; dead code goes when it closes."""
        from bmgraph.ir.editor import Editor

        editor = Editor(self, name, by)
        yield editor
        editor.close()

    def module(self, training: bool = False, graph: str = FORWARD) -> nn.Module:
        """The graph as a module over its own copy of no tensor: inputs by position, in the order of `inputs`.

        Raises InputError where `training` is asked of a program that only has its eval form.
        """
        from bmgraph.ir.eval_form import runnable

        if training and self.training:
            raise InputError(f"this program cannot train: {self.training}")
        return runnable(self, self.graphs[graph], training)

    def __call__(self, **batch: object) -> dict[str, torch.Tensor]:
        """Run the eval form on torch; the outputs by name. Losses are given where their inputs are."""
        checked = check_inputs(self.inputs, self.ranges, batch)
        with torch.no_grad():
            values = self.module()(*checked.values())
        return dict(zip((spec.name for spec in self.outputs), values))

    def structure(self) -> Structure:
        """The sites of the model (linears, attentions, feed-forwards, norms, ...), found in the dataflow."""
        from bmgraph.analysis.structure.finder import find

        return find(self)

    def save(self, path: str) -> None:
        """Write the program as a bundle that `bmgraph.load` reads; see `bmgraph.serialize.bundle`."""
        from bmgraph.serialize.program_bundle import save_program

        save_program(self, path)

    def save_delta(self, path: str) -> None:
        """Write the deltas alone, as a folder that `LoadDelta`, `Deltas` and PEFT read; see `bmgraph.deltas.peft_format`."""
        from bmgraph.deltas.peft_format import save_adapter

        save_adapter(self, path)

    def __str__(self) -> str:
        from bmgraph.ir.printer import program_text

        return program_text(self)

    def __repr__(self) -> str:
        count = sum(tensor.numel() for tensor in self.parameters.values())
        return f"<Program of {len(self.graph.nodes)} nodes and {count:,} parameters>"


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A graph of its own nodes, under the same names and with the same metadata."""
    copied = fx.Graph()
    values: dict[fx.Node, Any] = {}
    result = copied.graph_copy(graph, values, return_output_node=True)
    assert isinstance(result, tuple)
    output = copied.output(result[0])
    output.meta = dict(result[1].meta)
    copied.set_codegen(fx.graph.CodeGen())
    return copied


def output_node(graph: fx.Graph) -> fx.Node:
    """The node that returns."""
    last: fx.Node = next(iter(reversed(graph.nodes)))
    assert last.op == "output"
    return last


def placeholders(graph: fx.Graph) -> dict[str, fx.Node]:
    """The graph's inputs by name."""
    return {str(node.target): node for node in graph.nodes if node.op == "placeholder"}


def tensor_nodes(graph: fx.Graph) -> dict[str, fx.Node]:
    """The nodes that read a parameter or buffer, by the tensor's name."""
    return {str(node.target): node for node in graph.nodes if node.op == "get_attr"}


def summary(values: Mapping[str, torch.Tensor]) -> str:
    """`name f32[2, 3], ...` for messages."""
    return ", ".join(f"{name} {list(value.shape)}" for name, value in values.items())
