"""The graph of an evaluation: the summed loss and its count in eval form, read from a step's tensors where they live."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from bmgraph.errors import InputError
from bmgraph.ir.eval_form import eval_form, set_device
from bmgraph.ir.evaluation import GraphRunner
from bmgraph.ir.input_kind import InputKind
from bmgraph.ir.program import Program, output_node, placeholders, tensor_nodes
from bmgraph.ir.shape_inference import fake_parameter, reset_values
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import argument, place_of, traits_of
from bmgraph.training.computation import constants_of
from bmgraph.training.flat_graph import flat_graph
from bmgraph.training.gathered_outputs import Gathering
from bmgraph.training.placement import Piece, Place
from bmgraph.training.row_measure import RowMeasure
from bmgraph.training.step_program import CONSTANT, TENSOR, StepProgram
from bmgraph.training.weighted_terms import LossCounts
from bmgraph.utils.torch_internals import new_fake_mode, python_dispatcher

aten = torch.ops.aten
collective = torch.ops._c10d_functional

Terms = Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]
"""(outputs by name, inputs by name) -> (summed loss, number of items)."""

MOST_GATHERED = 2
"""Gathered tensors are kept for later readers up to so many times the largest one."""


@dataclass(frozen=True)
class EvaluationSource:
    """What an evaluation is traced from: the form of a program that its step was traced from, without data.

    `form` returns (sum, count, ...), where the sum holds one for each term if there are several, or, with a `loss`, its
    outputs, some of which may be gathered first. `counts`: how the items of several terms are counted.
    """

    form: Program
    loss: Terms | None
    gathering: Gathering
    counts: LossCounts | None

    @staticmethod
    def of(
        form: Program, loss: Terms | None, gathering: Gathering, counts: LossCounts | None = None
    ) -> EvaluationSource:
        """Keeps no tensor of the program."""
        empty = form.clone()
        device = form.device
        with new_fake_mode():
            for tensors in (empty.parameters, empty.buffers):
                for name, tensor in tensors.items():
                    tensors[name] = torch.empty_strided(
                        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
                    )
        empty.shared = {}
        return EvaluationSource(empty, loss, gathering, counts)

    @property
    def is_token_cross_entropy(self) -> bool:
        """Whether the loss is the mean of a plain cross-entropy over positions, which has a perplexity."""
        returned: Any = output_node(self.form.graph).args[0]
        total = returned[0]
        if self.loss is not None:
            return False
        while isinstance(total, fx.Node) and total.target is aten.to.dtype:
            total = total.args[0]
        if traits_of(total).kind is not Kind.LOSS or place_of(total.target, "ignore_index") is None:
            return False
        plain = argument(total, "weight") is None and not argument(total, "label_smoothing", 0.0)
        labels = [spec for spec in self.form.inputs if spec.kind is InputKind.LABELS]
        return plain and any(len(spec.shape) > 1 for spec in labels)


def trace_evaluation(step: StepProgram, measure: RowMeasure | None = None) -> StepProgram:
    """A step without backward and without updates: the summed loss (of each term, if there are several) and the count of a
    batch, in eval form, and behind them what a `measure` sums of it.

    It shares the tensors of the step, wherever a pass has put them: what is packed is read as views, what is split is
    gathered in front of its readers, what is stored in another dtype is cast. Collective where tensors are split.

    Raises InputError where a `measure` is to read the outputs of a model that gives its loss alone.
    """
    source = step.evaluation
    assert source is not None
    if measure is not None and source.loss is None:
        raise InputError(
            "measure= reads the model's outputs, and this trainer minimises one of them, which is all that it computes: give "
            "Torch(loss=) a function of (outputs, inputs)"
        )
    form = source.form.clone()
    names = [spec.name for spec in form.outputs]
    eval_form(form.graph, 2 if source.loss is None else len(names))
    set_device(form.graph, form.device)
    mode = reset_values(form)
    mode.allow_non_fake_inputs = True
    read = list(tensor_nodes(form.graph))
    fakes = [fake_parameter(form.tensor(name), mode) for name in read]
    inputs = {name: node.meta["val"] for name, node in placeholders(form.graph).items()}

    def terms(arguments: list[torch.Tensor], tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        values = GraphRunner(form.graph, dict(zip(read, tensors))).run(*arguments)
        if source.loss is None:
            return tuple(values[:2])
        given = (dict(zip(names, values)), dict(zip(inputs, arguments)))
        found = source.gathering.terms(source.loss, *given, step.rows.whole)
        return found if measure is None else (*found, measure(*given))

    with torch.no_grad(), mode, python_dispatcher():
        traced = make_fx(terms)(list(inputs.values()), fakes)
    constants = constants_of(traced)
    own = {f"{CONSTANT}{name}": tensor for name, tensor in constants.items()}
    evaluation = replace(
        step,
        graph=flat_graph(traced.graph, list(inputs), read, constants),
        tensors={**step.tensors, **own},
        places={**step.places, **{name: Place.whole(name, tensor) for name, tensor in own.items()}},
        updates={},
        masters={},
        writes=(),
    )
    _read_places(evaluation, dict(zip(read, fakes)))
    evaluation.graph.lint()
    return evaluation


def _read_places(step: StepProgram, wanted: dict[str, torch.Tensor]) -> None:
    """Let every reader of a parameter read it where its place says; `wanted` has its shape and dtype."""
    location = {
        piece.name: (name, place, piece)
        for name, place in step.places.items()
        for piece in place.pieces
        if place.packed or (place.dtype, place.device.type) != _kind(wanted.get(piece.name), place)
    }
    originals = {name: node for name, node in step.reads().items() if name in location}
    held = {
        tensor: step.placeholder(tensor)
        for tensor in dict.fromkeys(location[name][0] for name in originals)
        if tensor not in originals
    }
    device = next(iter(wanted.values())).device
    whole = _Gathered(step, held, originals, device)
    for node in list(step.graph.nodes):
        sources = [item for item in node.all_input_nodes if item.meta.get(TENSOR) in originals]
        if node in whole.made or not sources:
            continue
        for source in sources:
            name = str(source.meta[TENSOR])
            tensor, place, piece = location[name]
            view = whole.view(tensor, place, piece, wanted[name].dtype, node)
            node.replace_input_with(source, view)
    for name, node in originals.items():
        if not node.users and name not in step.tensors:
            step.graph.erase_node(node)


def _kind(wanted: torch.Tensor | None, place: Place) -> tuple[torch.dtype, str]:
    """The dtype and kind of device that a parameter is read in; those of its place if it is not read."""
    return (place.dtype, place.device.type) if wanted is None else (wanted.dtype, wanted.device.type)


class _Gathered:
    """The parameters that are whole at a point of a graph; those used last are kept, up to a number of bytes."""

    def __init__(
        self,
        step: StepProgram,
        held: dict[str, fx.Node],
        originals: dict[str, fx.Node],
        device: torch.device,
    ) -> None:
        self._step, self._held, self._originals = step, held, originals
        self._views: dict[str, dict[str, fx.Node]] = {}
        self._flat: dict[str, fx.Node] = {}
        self._bytes = {name: step.places[name].nbytes * (step.places[name].ranks if step.places[name].split else 1)
                       for name in (*held, *originals) if name in step.places}  # fmt: skip
        self._device = device
        self.made: set[fx.Node] = set()

    def view(self, tensor: str, place: Place, piece: Piece, dtype: torch.dtype, before: fx.Node) -> fx.Node:
        """One parameter in its shape and dtype, for a reader."""
        flat = self._whole(tensor, place, before)
        found = self._views.setdefault(tensor, {})
        if piece.name not in found:
            node = flat
            if place.packed:
                node = self._call(
                    aten.slice.Tensor, flat, 0, piece.offset, piece.offset + piece.size, before=before
                )
                node = self._call(aten.view.default, node, list(piece.shape), before=before)
            if place.dtype != dtype:
                node = self._call(aten._to_copy.default, node, dtype=dtype, before=before)
            found[piece.name] = node
        return found[piece.name]

    def _whole(self, tensor: str, place: Place, before: fx.Node) -> fx.Node:
        if tensor in self._flat:
            self._flat[tensor] = self._flat.pop(tensor)  # used last
            return self._flat[tensor]
        node = self._held.get(tensor) or self._originals[tensor]
        ranks = self._step.ranks
        if place.device.type != self._device.type:
            node = self._call(aten._to_copy.default, node, device=self._device, before=before)
        if place.split and ranks.size > 1:
            sent = self._call(
                collective.all_gather_into_tensor.default, node, ranks.size, ranks.group, before=before
            )
            node = self._call(collective.wait_tensor.default, sent, before=before)
        self._flat[tensor] = node
        self._views.pop(tensor, None)
        most = MOST_GATHERED * max(self._bytes.values())
        while sum(self._bytes[name] for name in self._flat) > most and len(self._flat) > 1:
            forgotten = next(iter(self._flat))
            del self._flat[forgotten]
            self._views.pop(forgotten, None)
        return node

    def _call(self, target: Callable[..., Any], *args: Any, before: fx.Node, **kwargs: Any) -> fx.Node:
        node = self._step.call(target, *args, before=before, **kwargs)
        self.made.add(node)
        return node
