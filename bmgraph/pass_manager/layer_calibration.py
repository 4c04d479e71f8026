"""Calibrates layer by layer: each part of the graph runs on what the parts before it, already rewritten, give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.structure.layer_parts import cut_at_layers
from bmgraph.analysis.structure.sites import Layer
from bmgraph.analysis.weight_sites import products
from bmgraph.errors import InputError, PassError, ResourceError
from bmgraph.ir.categorical_input import fill_categorical
from bmgraph.ir.eval_form import eval_form, in_eval, set_device
from bmgraph.ir.evaluation import GraphRunner, Visit
from bmgraph.ir.input_check import check_inputs
from bmgraph.ir.node_role import NodeRole, has_role
from bmgraph.ir.program import Program, placeholders
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of
from bmgraph.utils.finite import is_finite, not_finite_values
from bmgraph.utils.memory_budget import memory_budget
from bmgraph.utils.progress import track
from bmgraph.utils.spilled_values import SpilledValues
from bmgraph.utils.stored_tensor import in_memory

SHARE = 2
"""By default the values between parts take one part in SHARE of the memory that weights may take."""


def check_finite(node: fx.Node, value: torch.Tensor, batch: int, inputs: Mapping[str, torch.Tensor]) -> None:
    """Raise ResourceError for a measured value that is NaN or infinite: nothing can be concluded from it.

    The message names those of the batch's `inputs` that are not finite; alone they are no error: an additive mask holds -inf.
    """
    if is_finite(value):
        return
    kind = "NaN" if bool(value.isnan().any()) else "infinite"
    what = f"input {node.target!r}" if node.op == "placeholder" else f"value {node.name!r}"
    where = f" in {node.meta['scope']}" if node.meta.get("scope") else ""
    suspects = not_finite_values(inputs) if node.op != "placeholder" else ""
    because = f" (inputs that are not finite: {suspects})" if suspects else ""
    raise ResourceError(
        f"calibration batch {batch} makes the {what}{where} {kind}{because}: "
        "repair the batch or the model that computes it, or leave the batch out"
    )


class LayerPart:
    """A part of the graph while it is calibrated: one layer, several that share weights, or what is outside of layers.

    `layers`: the layers that it holds, none for what comes before, between and after them. Its inputs are there for all
    batches, so that it can be observed, and its weights are in memory, read once.
    """

    def __init__(self, run: _Run, index: int, layers: tuple[Layer, ...]) -> None:
        self._run, self._index, self.layers = run, index, layers

    @property
    def nodes(self) -> list[fx.Node]:
        """Its calls in order, as they are now."""
        part_of = self._run.part_of
        return [
            node
            for node in self._run.program.graph.nodes
            if part_of.get(node, self._index) == self._index and node.op == "call_function"
        ]

    @property
    def products(self) -> list[fx.Node]:
        """Its products with weights, linears and those of experts, in order; without those of deltas."""
        own = set(self.nodes)
        return [node for node in products(self._run.program.graph) if node in own]

    def observe(self, names: set[str], visit: Visit) -> int:
        """Run the part, as it is now, on all batches and call `visit(name, value)` for the nodes in `names`.

        These may be its nodes and its inputs. No more is run than they need. Returns the number of batches; raises PassError
        for another name, ResourceError for a value that is not finite.
        """
        return self._run.observe(self, self._index, names, visit)

    def __str__(self) -> str:
        return (
            " and ".join(layer.path or layer.sites[0] for layer in self.layers) or "what is outside of layers"
        )


def calibrate_layers(
    program: Program,
    batches: Iterable[Mapping[str, torch.Tensor]],
    rewrite: Callable[[LayerPart], None],
    memory: int | None,
) -> int:
    """See `Context.calibrate_layers`; `batches` is read once."""
    with SpilledValues(memory_budget() // SHARE if memory is None else memory) as values:
        run = _Run(program, values)
        run.read(batches)
        for index in track(range(len(run.layers)), "calibrating layers", len(run.layers)):
            part = LayerPart(run, index, run.layers[index])
            run.hold()
            rewrite(part)
            if index + 1 < len(run.layers):
                run.settle(part, index)
                run.advance(index)
        return run.count


class _Run:
    """The values that flow into one part, for all batches, and what has run already."""

    def __init__(self, program: Program, values: SpilledValues) -> None:
        parts = cut_at_layers(program)
        self.program, self.layers, self.part_of = program, parts.layers, dict(parts.part_of)
        self.count = 0
        self._constants, self._values = parts.constants, values
        self._suspects: list[dict[str, torch.Tensor]] = []
        """For each batch its inputs that are not finite."""
        self._inputs: list[fx.Node] = list(placeholders(program.graph).values())
        """The nodes whose values are there."""
        self._ran: dict[fx.Node, tuple[Any, ...]] = {}
        """What has run -> what it was then."""
        self._ran_tensors: dict[str, torch.Tensor] = {}
        self._held: dict[str, torch.Tensor] = {}

    def read(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Keep the inputs of all batches. Raises ResourceError for one that does not fit the program."""
        program = self.program
        read = [node for node in self._inputs if node.users]
        for batch in batches:
            try:
                filled = fill_categorical(program.inputs, batch, start=self.count)
                given = check_inputs(program.inputs, program.ranges, filled, program.ignored, program.cache)
            except InputError as error:
                raise ResourceError(
                    f"calibration batch {self.count} does not fit the program: {error}"
                ) from error
            for node in read:
                self._values.put((self.count, node), given[str(node.target)].to(program.device))
            self._suspects.append({name: value for name, value in given.items() if not is_finite(value)})
            self.count += 1
        self._inputs = read

    def hold(self) -> None:
        """Let go of the weights of the part before."""
        self._held = {}

    def observe(self, part: LayerPart, index: int, names: set[str], visit: Visit) -> int:
        """Run what `names` need on all batches."""
        known = {node.name: node for node in self.program.graph.nodes}
        wanted: dict[fx.Node, list[str]] = {}
        for name in sorted(names):
            if name not in known:
                raise PassError(f"no node is called {name!r}, which is to be observed in {part}")
            wanted.setdefault(in_eval(known[name]), []).append(name)
        graph, order = self._graph(part, index, list(wanted))
        shown = {node.name: node for node in wanted}
        for batch in track(range(self.count), f"observing {part}", self.count):

            def visit_finite(name: str, value: torch.Tensor, batch: int = batch) -> None:
                check_finite(shown[name], value, batch, self._suspects[batch])
                for asked in wanted[shown[name]]:
                    visit(asked, value)

            self._computed(graph, order, batch, frozenset(shown), visit_finite)
        return self.count

    def settle(self, part: LayerPart, index: int) -> None:
        """Take in what the rewriting added. Raises PassError if it changed what has run: later parts would not see that."""
        for node in self.program.graph.nodes:
            if node in self.part_of:
                continue
            sources = node.all_input_nodes
            if node.op != "placeholder" and all(item in self._constants for item in sources):
                self._constants.add(node)
            own = [self.part_of[item] for item in sources if item not in self._constants]
            self.part_of[node] = max((index, *own))
        changed = [node for node, state in self._ran.items() if _state(node) != state]
        tensors = self.program.tensors()
        moved = [name for name, tensor in self._ran_tensors.items() if tensors.get(name) is not tensor]
        if changed or moved:
            what = changed[0].meta.get("site") or changed[0].name if changed else moved[0]
            raise PassError(
                f"the rewriting of {part} changes {what}, with which an earlier part has run: rewrite a weight where it is read "
                "first, or replace this use of it alone"
            )

    def advance(self, index: int) -> None:
        """Run a part on all batches: what later parts read takes the place of its inputs."""
        own = [node for node in self.program.graph.nodes if self.part_of[node] == index]
        candidates = [node for node in dict.fromkeys((*self._inputs, *own)) if node not in self._constants]
        outputs = [
            node
            for node in candidates
            if traits_of(node).kind is not Kind.DROPOUT and self._is_read_after(node, index)
        ]
        there = set(self._inputs)
        computed = [node for node in outputs if node not in there]
        part = LayerPart(self, index, self.layers[index])
        graph, order = self._graph(part, index, computed, ran=True)
        gone = [node for node in self._inputs if node not in set(outputs)]
        for batch in track(range(self.count), f"running {part}", self.count):
            found = self._computed(graph, order, batch)
            for node in gone:
                self._values.drop((batch, node))
            for node, value in zip(computed, found):
                self._values.put((batch, node), value)
        self._inputs = outputs

    def _is_read_after(self, node: fx.Node, index: int) -> bool:
        """Whether a later part reads a value, in eval form."""
        return any(
            user.op != "output"
            and (
                self.part_of[user] > index
                or (traits_of(user).kind is Kind.DROPOUT and self._is_read_after(user, index))
            )
            for user in node.users
        )

    def _computed(
        self,
        graph: fx.Graph,
        order: list[fx.Node],
        batch: int,
        names: frozenset[str] = frozenset(),
        visit: Visit | None = None,
    ) -> Any:
        """The outputs of a graph on the values of one batch."""
        inputs = [self._values.get((batch, node)) for node in order]
        with torch.no_grad():
            return GraphRunner(graph, self._held, names, visit).run(*inputs)

    def _graph(
        self, part: LayerPart, index: int, outputs: list[fx.Node], ran: bool = False
    ) -> tuple[fx.Graph, list[fx.Node]]:
        """The eval form of what computes `outputs`, and the nodes whose values it takes; its tensors are held in memory.

        With `ran` it is noted as what has run.
        """
        there = set(self._inputs)
        needed = sorted(self._needed(part, index, outputs, there))
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        order = [node for node in needed if node in there]
        for node in order:
            copies[node] = graph.placeholder(node.name)
        for node in needed:
            if node not in copies:
                if node in self._constants and has_role(node, NodeRole.WEIGHT) and node.op == "call_function":
                    self._held[node.name] = in_memory(evaluate(self.program, node))  # once for all batches
                    copies[node] = graph.get_attr(node.name)
                else:
                    copies[node] = graph.node_copy(node, copies.__getitem__)
                if node.op == "get_attr":
                    name = str(node.target)
                    tensor = self.program.tensor(name)
                    self._held[name] = in_memory(tensor)
                    if ran:
                        self._ran_tensors[self.program.ties.get(name, name)] = tensor
                if ran:
                    self._ran[node] = _state(node)
        graph.output(tuple(copies[node] for node in outputs))
        eval_form(graph, len(outputs))
        set_device(graph, self.program.device)
        return graph, order

    def _needed(
        self, part: LayerPart, index: int, outputs: list[fx.Node], there: set[fx.Node]
    ) -> Iterator[fx.Node]:
        """What computes `outputs` from the values that are there. Raises PassError for what they do not give."""
        seen: set[fx.Node] = set()
        left = list(outputs)
        while left:
            node = left.pop()
            if node in seen:
                continue
            seen.add(node)
            yield node
            if node in there:
                continue
            inside = self.part_of.get(node, index) == index or node in self._constants
            if node.op == "placeholder" or not (inside or traits_of(node).kind is Kind.DROPOUT):
                raise PassError(
                    f"{node.name!r} is not computed in {part}: read a value of this part, or one that flows into it"
                )
            left += node.all_input_nodes


def _state(node: fx.Node) -> tuple[Any, ...]:
    """All of a call that an edit can change."""
    return node.target, node.args, node.kwargs
