"""The class `Program`: a model as named graphs over one set of parameters, with named inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx, nn

from bmgraph.errors import InputError
from bmgraph.ir.cache_spec import CacheLayout
from bmgraph.ir.computation import Computation
from bmgraph.ir.generation_defaults import GenerationDefaults
from bmgraph.ir.input_check import check_inputs
from bmgraph.ir.omitted_inputs import with_encoded
from bmgraph.ir.shared_weights import SharedWeight
from bmgraph.ir.tensor_spec import Range, TensorSpec
from bmgraph.utils.stored_tensor import is_too_large, tensor_on

if TYPE_CHECKING:
    from bmgraph.analysis.structure.sites import Structure
    from bmgraph.ir.editor import Editor
    from bmgraph.ir.pass_record import Record

FORWARD = "forward"


@dataclass(eq=False)
class Program:
    """Named graphs (`forward`, ...) over one set of parameters and buffers.

    A graph has one placeholder per input and one `get_attr` per tensor that it reads; it returns the outputs in order,
    then the new values of the buffers named in `writes`. Graphs are kept in training form (dropout is a node); calling
    the program runs the eval form, derived from it. Parameters are never changed in place, so clones share their storage.

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
    """Name of a dynamic size -> its range."""
    ties: dict[str, str] = field(default_factory=dict)
    """Alias of a tied parameter -> the name that it is kept under."""
    writes: tuple[str, ...] = ()
    """Buffers whose new values the graph returns after its outputs, in this order."""
    losses: tuple[str, ...] = ()
    """Outputs that are losses: scalars to minimize."""
    symbols: dict[Any, str] = field(default_factory=dict)
    """Symbol of the shape environment -> the name of its size."""
    example: dict[str, torch.Tensor] = field(default_factory=dict)
    """The inputs that the program was captured with; verification compares outputs on them."""
    frozen: frozenset[str] = frozenset()
    """Parameters that training does not change."""
    trained_whole: frozenset[str] = frozenset()
    """Parameters and buffers of the model that belong to its delta: they train whole and are saved with the factors."""
    training: str = ""
    """Why the program cannot train (it was captured in eval mode, or its backward is not the model's); empty if it can."""
    backward: str = ""
    """What `capture(..., prove="training")` compared of the model's backward; empty if nothing."""
    fixed: tuple[str, ...] = ()
    """Sizes that were requested as dynamic, but that the model fixes."""
    narrower: tuple[str, ...] = ()
    """One line for each size in `fixed` of which the captured model takes others."""
    ignored: tuple[str, ...] = ()
    """Inputs of the captured model that no output needs any more, such as labels: a batch may hold them."""
    unproven: tuple[str, ...] = ()
    """Batches on which the captured program was not compared with its model, because the model refused them."""
    fingerprint: str = ""
    """Identity of the backbone's weights as captured (`bmgraph.utils.digest.fingerprint`). Approximations keep it; passes
    that make another model, such as merging a delta, compute it again. Empty if unknown."""
    computation: Computation = field(default_factory=Computation)
    """What the captured model computes with its weights; passes keep it. Empty if unknown."""
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)
    """What the model's own generation config says: the ids that start and end a text, and its length."""
    shared: dict[str, SharedWeight] = field(default_factory=dict)
    """Parameters as captured whose storage is the model's; what uses a program refuses one whose model changed them."""
    cache: CacheLayout | None = None
    """Which inputs and outputs are a KV cache, as the pass that added it says; None without one."""
    encoder: Program | None = None
    """The encoder of a decoder with a KV cache: runs once, before decoding; its outputs are inputs of the decoder, by name."""
    history: tuple[Record, ...] = ()
    """One record for each pass that ran on the program."""

    _kept: Any = field(default=None, init=False, repr=False)
    """What `__call__` ran last, a `bmgraph.ir.kept_module.KeptModule`."""

    @property
    def graph(self) -> fx.Graph:
        """The main graph."""
        return self.graphs[FORWARD]

    @property
    def device(self) -> torch.device:
        """The device of the tensors; cpu if there are none."""
        for tensor in (*self.parameters.values(), *self.buffers.values()):
            return tensor.device
        return torch.device("cpu")

    @property
    def fits_in_memory(self) -> bool:
        """Whether all tensors can be in memory at a time; else those in files are read for each use, and programs are not
        compared by running them."""
        encoder = self.encoder
        return not any(map(is_too_large, self.parameters.values())) and (
            encoder is None or encoder.fits_in_memory
        )

    def tensor(self, name: str) -> torch.Tensor:
        """The parameter or buffer of that name, which may be the alias of a tied parameter.

        Raises InputError for an unknown name.
        """
        name = self.ties.get(name, name)
        found = self.parameters.get(name, self.buffers.get(name))
        if found is None:
            raise InputError(f"no parameter or buffer is called {name!r}")
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers by name."""
        return {**self.parameters, **self.buffers}

    def clone(self) -> Program:
        """A copy with separate graphs and tables that shares the storage of all tensors."""
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
        """A copy with all tensors on `device`."""
        from bmgraph.ir.shape_inference import propagate

        moved = self.clone()
        for table in (moved.parameters, moved.buffers):
            for name, tensor in table.items():
                table[name] = tensor_on(tensor, torch.device(device))
        moved.encoder = self.encoder and self.encoder.to(device)
        if torch.device(device).type != "meta":
            moved.example = {name: tensor.to(device) for name, tensor in self.example.items()}
        if moved.device != self.device:
            propagate(
                moved, everything=True
            )  # the shapes of new nodes are inferred from values on the device
        return moved

    @contextmanager
    def edit(self, name: str = FORWARD, by: str = "") -> Iterator[Editor]:
        """A context manager that gives an editor of one graph; on exit it removes dead code and checks the graph."""
        from bmgraph.ir.editor import Editor

        editor = Editor(self, name, by)
        yield editor
        editor.close()

    def module(self, training: bool = False, graph: str = FORWARD) -> nn.Module:
        """The graph as a module that shares the program's tensors: inputs by position, in the order of `inputs`.

        With `training` it runs the training form and updates the program's buffers. Raises InputError if the program
        cannot train.
        """
        from bmgraph.ir.eval_form import runnable

        if training and self.training:
            raise InputError(f"this program cannot train: {self.training}")
        return runnable(self, self.graphs[graph], training)

    def __call__(self, **batch: object) -> dict[str, torch.Tensor]:
        """Run the eval form in torch, on the device of the tensors; the outputs by name.

        Raises InputError if the batch does not fit `inputs`.
        """
        given = with_encoded(self.encoder, self.inputs, batch)
        checked = check_inputs(self.inputs, self.ranges, given, self.ignored, self.cache)
        from bmgraph.ir.kept_module import KeptModule

        self._kept = KeptModule.of(self, self._kept)
        with torch.no_grad():
            values = self._kept.run(self, (value.to(self.device) for value in checked.values()))
        return dict(zip((spec.name for spec in self.outputs), values))

    def structure(self) -> Structure:
        """Find the sites of the model (linears, attentions, feed-forwards, norms, ...) in its dataflow."""
        from bmgraph.analysis.structure.finder import find

        return find(self)

    def save(self, path: str, weights: Literal["copy", "reference"] = "copy") -> None:
        """Write the program as a bundle that `bmgraph.load` reads, a tensor at a time.

        With weights="reference", parameters that are still those of a file (of the folder that `capture` was given, or of a
        bundle) are not written again: the bundle names the file and their digests, and loads where the file still lies.
        Raises BundleError if the bundle cannot be written, or such a file was moved or changed.
        """
        from bmgraph.serialize.program_bundle import save_program

        save_program(self, path, weights)

    def save_delta(self, path: str) -> None:
        """Write the deltas without the backbone, as a folder that `LoadDelta`, `Deltas` and PEFT read.

        See `bmgraph.deltas.peft_format`.
        """
        from bmgraph.deltas.peft_format import save_adapter

        save_adapter(self, path)

    def __str__(self) -> str:
        from bmgraph.ir.printer import program_text

        return program_text(self)

    def __repr__(self) -> str:
        count = sum(tensor.numel() for tensor in self.parameters.values())
        return f"<Program of {len(self.graph.nodes)} nodes and {count:,} parameters>"


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph: new nodes with the same names and metadata."""
    copied = fx.Graph()
    values: dict[fx.Node, Any] = {}
    result = copied.graph_copy(graph, values, return_output_node=True)
    assert isinstance(result, tuple)
    output = copied.output(result[0])
    output.meta = dict(result[1].meta)
    copied.set_codegen(fx.graph.CodeGen())
    return copied


def output_node(graph: fx.Graph) -> fx.Node:
    """The output node of a graph."""
    last: fx.Node = next(iter(reversed(graph.nodes)))
    assert last.op == "output"
    return last


def placeholders(graph: fx.Graph) -> dict[str, fx.Node]:
    """The placeholders of a graph by the name of their input."""
    return {str(node.target): node for node in graph.nodes if node.op == "placeholder"}


def tensor_nodes(graph: fx.Graph) -> dict[str, fx.Node]:
    """The nodes that read a parameter or buffer, by its name."""
    return {str(node.target): node for node in graph.nodes if node.op == "get_attr"}
