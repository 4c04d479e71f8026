"""The class `Program`: a model as named graphs with a signature each, over one set of parameters and buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx, nn

from bmgraph.errors import InputError
from bmgraph.ir.cache_spec import CacheLayout
from bmgraph.ir.computation import Computation
from bmgraph.ir.generation_defaults import GenerationDefaults
from bmgraph.ir.input_check import check_inputs
from bmgraph.ir.omitted_inputs import with_fed
from bmgraph.ir.shared_weights import SharedWeight
from bmgraph.ir.signature import OfEntry, Signature
from bmgraph.ir.step_rules import StepRule
from bmgraph.ir.tensor_spec import Range, TensorSpec
from bmgraph.utils.graph_copies import copy_nodes
from bmgraph.utils.stored_tensor import is_too_large, tensor_on

if TYPE_CHECKING:
    from bmgraph.analysis.structure.sites import Structure
    from bmgraph.deltas.module_tree import ModuleTree
    from bmgraph.ir.editor import Editor
    from bmgraph.ir.pass_record import Record

FORWARD = "forward"


class _Entry:
    """Holds the name of a program's entry apart from what programs at several entries share."""

    __slots__ = ("entry",)

    entry: str
    """The graph that `graph` and the attributes of `Signature` are those of, and that a call runs; `at` gives others."""


@dataclass(eq=False)
class Program(_Entry):
    """Named graphs (`forward`, ...) with a signature each, over one set of parameters and buffers.

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
    signatures: dict[str, Signature]
    """Name of a graph -> what it takes and returns."""
    ties: dict[str, str] = field(default_factory=dict)
    """Alias of a tied parameter -> the name that it is kept under."""
    frozen: frozenset[str] = frozenset()
    """Parameters that training does not change."""
    trained_whole: frozenset[str] = frozenset()
    """Parameters and buffers of the model that belong to its delta: they train whole and are saved with the factors."""
    lr_factors: dict[str, float] = field(default_factory=dict)
    """Parameter -> the factor of the optimizer's learning rate at which it trains; 1 for those that are not named."""
    step_rules: tuple[StepRule, ...] = ()
    """What training does beside its steps, such as masks that grow."""
    training: str = ""
    """Why the program cannot train (it was captured in eval mode, or its backward is not the model's); empty if it can."""
    backward: str = ""
    """What `capture(..., prove="training")` compared of the model's backward; empty if nothing."""
    fingerprint: str = ""
    """Identity of the backbone's weights as captured (`bmgraph.utils.digest.fingerprint`). Approximations keep it; passes
    that make another model, such as merging a delta, compute it again. Empty if unknown."""
    computation: Computation = field(default_factory=Computation)
    """What the captured model computes with its weights; passes keep it. Empty if unknown."""
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)
    """What the model's own generation config says: the ids that start and end a text, and its length."""
    memory: int | None = None
    """How many bytes weights, activations and a cache may take where the program runs, which then reads the other weights from
    their files at each use; None for no limit."""
    shared: dict[str, SharedWeight] = field(default_factory=dict)
    """Parameters as captured whose storage is the model's; what uses a program refuses one whose model changed them."""
    history: tuple[Record, ...] = ()
    """One record for each pass that ran on the program."""

    _kept: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """What `__call__` ran last of each graph, a `bmgraph.ir.kept_module.KeptModule`."""

    inputs = OfEntry[tuple[TensorSpec, ...]]()
    outputs = OfEntry[tuple[TensorSpec, ...]]()
    ranges = OfEntry[dict[str, Range]]()
    writes = OfEntry[tuple[str, ...]]()
    losses = OfEntry[tuple[str, ...]]()
    symbols = OfEntry[dict[Any, str]]()
    example = OfEntry[dict[str, torch.Tensor]]()
    fixed = OfEntry[tuple[str, ...]]()
    narrower = OfEntry[tuple[str, ...]]()
    ignored = OfEntry[tuple[str, ...]]()
    unproven = OfEntry[tuple[str, ...]]()
    cache = OfEntry[CacheLayout | None]()

    def __post_init__(self) -> None:
        self.entry = FORWARD

    @property
    def graph(self) -> fx.Graph:
        """The graph of the entry."""
        return self.graphs[self.entry]

    def at(self, name: str) -> Program:
        """The same program with the graph `name` as its entry: all else is shared, so edits of either are edits of both.

        Raises InputError for an unknown name.
        """
        if name == self.entry:
            return self
        if name not in self.graphs:
            raise InputError(f"no graph is called {name!r}: the program has {', '.join(self.graphs)}")
        other = object.__new__(Program)
        other.__dict__, other.entry = self.__dict__, name
        return other

    def entries(self) -> list[Program]:
        """The program at each of its graphs."""
        return [self.at(name) for name in self.graphs]

    def add_graph(self, name: str, source: Program) -> None:
        """Add the entry of `source` as the graph `name`, with the tensors that it reads and the program does not have.

        Raises InputError if the name is taken, and for a tensor that both programs have with other values.
        """
        if name in self.graphs:
            raise InputError(f"the program has a graph {name!r} already: choose another name")
        own = self.tensors()
        for node in tensor_nodes(source.graph):
            tensor = source.tensor(node)
            if node not in own:
                (self.parameters if node in source.parameters else self.buffers)[node] = tensor
            elif own[node] is not tensor and not _same(own[node], tensor):
                raise InputError(
                    f"graph {name!r} reads {node!r} with other values than the program's: give it another name"
                )
        self.frozen |= source.frozen.difference(own).intersection(self.parameters)
        self.lr_factors |= {key: value for key, value in source.lr_factors.items() if key not in own}
        self.step_rules += tuple(rule for rule in source.step_rules if rule not in self.step_rules)
        self.graphs[name], self.signatures[name] = source.graph, source.signatures[source.entry]

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
        return not any(map(is_too_large, self.parameters.values()))

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
        cloned = replace(
            self,
            graphs={name: copy_graph(graph) for name, graph in self.graphs.items()},
            parameters=dict(self.parameters),
            buffers=dict(self.buffers),
            signatures={name: signature.copy() for name, signature in self.signatures.items()},
            ties=dict(self.ties),
            lr_factors=dict(self.lr_factors),
        )
        cloned.entry = self.entry
        return cloned

    def to(self, device: torch.device | str) -> Program:
        """A copy with all tensors on `device`."""
        from bmgraph.ir.shape_inference import propagate

        moved = self.clone()
        for table in (moved.parameters, moved.buffers):
            for name, tensor in table.items():
                table[name] = tensor_on(tensor, torch.device(device))
        if torch.device(device).type != "meta":
            for entry in moved.entries():
                entry.example = {name: tensor.to(device) for name, tensor in entry.example.items()}
        if moved.device != self.device:
            propagate(
                moved, everything=True
            )  # the shapes of new nodes are inferred from values on the device
        return moved

    @contextmanager
    def edit(self, name: str | None = None, by: str = "") -> Iterator[Editor]:
        """A context manager that gives an editor of one graph, by default the entry; on exit it removes dead code and
        checks the graph."""
        from bmgraph.ir.editor import Editor

        editor = Editor(self.at(name or self.entry), by)
        yield editor
        editor.close()

    def module(self, training: bool = False) -> nn.Module:
        """The entry as a module that shares the program's tensors: inputs by position, in the order of `inputs`.

        With `training` it runs the training form and updates the program's buffers. Raises InputError if the program
        cannot train.
        """
        from bmgraph.ir.eval_form import runnable

        if training and self.training:
            raise InputError(f"this program cannot train: {self.training}")
        return runnable(self, self.graph, training)

    def __call__(self, **batch: object) -> dict[str, torch.Tensor]:
        """Run the entry in eval form in torch, on the device of the tensors; the outputs by name.

        Where other graphs give some of its inputs, by name, and the batch holds the inputs of these instead, they run
        first. Raises InputError if the batch does not fit `inputs`.
        """
        given = with_fed(self.feeders(), self.inputs, batch)
        checked = check_inputs(self.inputs, self.ranges, given, self.ignored, self.cache)
        from bmgraph.ir.kept_module import KeptModule

        kept = self._kept[self.entry] = KeptModule.of(self, self._kept.get(self.entry))
        with torch.no_grad():
            values = kept.run(self, (value.to(self.device) for value in checked.values()))
        return dict(zip((spec.name for spec in self.outputs), values))

    def feeders(self) -> list[Program]:
        """The program at the other graphs whose outputs are inputs of the entry, by name."""
        wanted = {spec.name for spec in self.inputs}
        return [
            other
            for other in self.entries()
            if other.entry != self.entry and not wanted.isdisjoint(spec.name for spec in other.outputs)
        ]

    def structure(self) -> Structure:
        """Find the sites of the model (linears, attentions, feed-forwards, norms, ...) in its dataflow."""
        from bmgraph.analysis.structure.finder import find

        return find(self)

    def tree(self) -> ModuleTree:
        """The modules with their tensors, what of them trains, deltas, counts and shares; prints as a tree, `as_json()` too."""
        from bmgraph.deltas.module_tree import module_tree

        return module_tree(self)

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

    def save_pretrained(self, path: str | Path, like: str | Path) -> None:
        """Write the weights as a Hugging Face folder, under the names of the folder `like` that the model came from.

        Configuration and tokenizer are copied from it; sizes that a pass changed alike in all layers (`Shrink`) are written
        into config.json. The folder is read by transformers and compared with the program before it gets its name.
        Raises InputError, naming what, for a program that such a folder cannot hold (deltas that are not merged, codes of
        int8, layers of several sizes), and BundleError if it cannot be written.
        """
        from bmgraph.frontend.hf_export import save_pretrained

        save_pretrained(self, Path(path), Path(like))

    def __str__(self) -> str:
        from bmgraph.ir.printer import program_text

        return program_text(self)

    def __repr__(self) -> str:
        count = sum(tensor.numel() for tensor in self.parameters.values())
        nodes = sum(len(graph.nodes) for graph in self.graphs.values())
        return f"<Program of {nodes} nodes and {count:,} parameters>"


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and (one.device.type == "meta" or torch.equal(one, other))


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph: new nodes with the same names and metadata."""
    copied = fx.Graph()
    output = copied.output(copy_nodes(copied, graph, {}))
    output.meta = dict(output_node(graph).meta)
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
