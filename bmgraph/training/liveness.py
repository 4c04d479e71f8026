"""Simulates the gradient phase of a step without data: which storages live while each call runs, and what they hold.

A value lives from the call that makes it to its last reader, as in `executor.py`. Views and other aliases share the storage
of their base, which lives as long as any of them. What kernels allocate inside, and free before they return, is not seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, cast

import torch
from torch import fx

from bmgraph.errors import InputError
from bmgraph.ir.evaluation import run_call
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of
from bmgraph.training.collectives import COLLECTIVES, Buffers, exchanges, other_shares
from bmgraph.training.executor import lowered_graph, written_in_place
from bmgraph.training.gradient_calls import take_gradients
from bmgraph.training.graph_lowering import OWN
from bmgraph.training.recompute_weights import parameter_expressions
from bmgraph.training.step_program import StepProgram
from bmgraph.utils.torch_internals import FakeTensorMode, process_group_of, python_dispatcher

collective = torch.ops._c10d_functional

Shapes = Mapping[str, Sequence[int]]
"""The sizes of the inputs of a rank, by name."""


class Held(StrEnum):
    """What the memory of a rank is held for."""

    PARAMETERS = "parameters"
    """Values of parameters, or this rank's shares of them, and buffers."""
    GRADIENTS = "gradients"
    STATE = "state"
    """The optimizer's moments and master copies."""
    GATHERED = "gathered"
    """Made of parameters alone: gathered from shards, dequantized, cast."""
    ACTIVATIONS = "activations"
    """All else that the graph computes, and the batch."""
    TEMPORARIES = "temporaries"
    """What the update phase allocates besides gradients."""
    OFFLOADED = "offloaded"
    """In files: no memory is held for it."""


@dataclass(frozen=True)
class Point:
    """The bytes that live while one call runs. `where`: the module path and the operator, or a part of the update phase."""

    where: str
    bytes: Mapping[Held, int]

    @property
    def total(self) -> int:
        """All live bytes."""
        return sum(self.bytes.values())


@dataclass(frozen=True)
class Sent:
    """One collective: its operator's name, and the bytes of its whole tensor."""

    kind: str
    bytes: int


@dataclass
class Simulated:
    """A run of the gradient phase: a point for each call, collectives in order, and the returned fake tensors."""

    points: list[Point] = field(default_factory=list)
    collectives: list[Sent] = field(default_factory=list)
    returned: list[torch.Tensor] = field(default_factory=list)
    sizes: dict[fx.Node, int] = field(default_factory=dict)
    """Bytes of the storages of each node's value."""
    batch: int = 0
    """Bytes of the inputs."""


class Storages:
    """Counts the bytes of live storages by what they are held for; each may be held several times."""

    def __init__(self) -> None:
        self.bytes: Counter[Held] = Counter()
        self._elsewhere: set[int] = set()
        self._holders: Counter[int] = Counter()
        self._kinds: dict[int, tuple[Held, int]] = {}

    def hold(self, value: Any, held: Held) -> None:
        """Hold the storages of a value once more; new ones count as `held`."""
        for key, size in storages_of(value).items():
            if key in self._elsewhere:
                continue
            if not self._holders[key]:
                self._kinds[key] = held, size
                self.bytes[held] += size
            self._holders[key] += 1

    def release(self, keys: Iterable[int]) -> None:
        """Hold storages once less; those that nobody holds are gone."""
        for key in keys:
            if key in self._elsewhere:
                continue
            self._holders[key] -= 1
            if not self._holders[key]:
                held, size = self._kinds.pop(key)
                self.bytes[held] -= size

    def leave_out(self, buffers: Buffers) -> None:
        """Do not count the storages of pooled buffers, as they are now: the key of one that was freed comes again."""
        pools = (buffers.gathered, buffers.flat, buffers.summed)
        self._elsewhere = {key for pool in pools for key in pool.storages()}

    def leaves_out(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in a pooled buffer."""
        return tensor.untyped_storage()._cdata in self._elsewhere

    def become(self, value: Any, held: Held) -> None:
        """Count the storages of a value as held for something else from now on."""
        for key in storages_of(value):
            if key in self._elsewhere:
                continue
            before, size = self._kinds[key]
            self.bytes[before] -= size
            self.bytes[held] += size
            self._kinds[key] = held, size

    def point(self, where: str) -> Point:
        """What lives in memory now."""
        return Point(where, {held: size for held, size in self.bytes.items() if held is not Held.OFFLOADED})


def storages_of(value: Any) -> dict[int, int]:
    """The storages that a value lies in: key -> bytes."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        return {storage._cdata: int(storage.nbytes())}
    if isinstance(value, (tuple, list)):
        return {key: size for item in value for key, size in storages_of(item).items()}
    return {}


def fakes_of(tensors: Mapping[str, torch.Tensor], mode: FakeTensorMode) -> dict[str, torch.Tensor]:
    """Tensors without data, of the same shapes, strides, dtypes and devices."""
    with mode:
        return {
            name: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
            for name, tensor in tensors.items()
        }


def simulate(
    step: StepProgram,
    inputs: Shapes,
    tensors: Mapping[str, torch.Tensor],
    mode: FakeTensorMode,
    sums: Mapping[str, torch.Tensor] | None = None,
    buffers: Buffers | None = None,
    in_backward: bool = False,
) -> Simulated:
    """Run the graph of a step, in the form that runs, on fake `tensors` (those of the step), inputs of the given sizes, and
    `sums` of gradients over the micro-batches before, which the graph reads by name.

    `buffers` without data stay from run to run; what lies in them is not in the points, since they never shrink while it
    does. Without them the graph is taken as it is. `in_backward`: gradients are taken as soon as they are whole. The
    optimizer's state is not counted. Raises InputError for an input whose size is not given.
    """
    if buffers is not None:
        step = replace(step, graph=lowered_graph(step.graph, buffers))
    kinds = kinds_of(step)
    if in_backward:
        assert buffers is not None  # so the graph is a copy
        take_gradients(step.graph, step.trained, _let_go)
    run = _Run(step, tensors, sums or {}, buffers or Buffers(), kinds)
    with mode, python_dispatcher(), torch.no_grad():
        run.begin(_inputs(step, inputs, mode))
        for node in step.graph.nodes:
            if node.op == "call_function":
                run.call(node)
    run.found.returned = [run.values[node] for node in step.returned() if node is not None]
    return run.found


def _let_go(*_: object) -> None:
    return None


def _inputs(step: StepProgram, shapes: Shapes, mode: FakeTensorMode) -> list[torch.Tensor]:
    made = []
    for spec in step.outline.inputs:
        if spec.name not in shapes:
            raise InputError(f"no size is known for input {spec.name!r}: give an example with all inputs")
        made.append(torch.empty(tuple(shapes[spec.name]), dtype=spec.dtype, device=step.device))
    return made


class _Run:
    def __init__(
        self,
        step: StepProgram,
        tensors: Mapping[str, torch.Tensor],
        sums: Mapping[str, torch.Tensor],
        buffers: Buffers,
        kinds: Mapping[fx.Node, Held],
    ) -> None:
        self.step, self.tensors, self.sums, self.buffers = step, tensors, sums, buffers
        self.values: dict[fx.Node, Any] = {}
        self.found = Simulated()
        self.storages = Storages()
        self._received: dict[fx.Node, torch.Tensor] = {}
        """Where shares of other ranks are received, until they are summed."""
        self._kinds = kinds
        self._dying = last_reads(step.graph)

    def begin(self, inputs: Sequence[torch.Tensor]) -> None:
        """Hold the tensors of the step, copies of the buffers that the graph writes, and the inputs."""
        for tensor in self.tensors.values():
            self.storages.hold(tensor, Held.PARAMETERS)
        for tensor in self.sums.values():
            self.storages.hold(tensor, Held.GRADIENTS)
        copies = {name: self.tensors[name].clone() for name in written_in_place(self.step)}
        for value in (*copies.values(), *inputs):
            self.storages.hold(value, Held.ACTIVATIONS)
        self.found.batch = sum(tensor.nbytes for tensor in inputs)
        held = {**self.tensors, **self.sums, **copies}
        given = [*inputs, *(held[name] for name in self.step.reads())]
        placeholders = [node for node in self.step.graph.nodes if node.op == "placeholder"]
        self.values = dict(zip(placeholders, given))
        for node, value in self.values.items():
            self.found.sizes[node] = sum(storages_of(value).values())
        self._placeholders = set(placeholders)

    def call(self, node: fx.Node) -> None:
        """Run one call, note what lives while it runs, and release what it read last."""
        if node.target is collective.wait_tensor.default:
            begun: Any = node.args[0]
            value = self.values[begun]  # the same storage
            self._received.pop(begun, None)
        else:
            value = self._value(node)
            self._note(node, value)
        self.values[node] = value
        sizes = storages_of(value)
        self.found.sizes[node] = sum(sizes.values())
        self.storages.leave_out(self.buffers)
        self.storages.hold(value, self._kinds.get(node, Held.ACTIVATIONS))
        self.found.points.append(self.storages.point(where_of(node)))
        for dying in self._dying.get(node, ()):
            if dying not in self._placeholders:
                self.storages.release(storages_of(self.values.pop(dying)))

    def _value(self, node: fx.Node) -> Any:
        """What a call returns; collectives return pooled buffers, as `collectives.py` does."""
        if node.target is collective.all_gather_into_tensor.default:
            shard, ranks = self.values[node.args[0]], node.args[1]  # type: ignore[index]
            flat = self.buffers.gathered.take(ranks * shard.numel(), shard.dtype, shard.device)
            return flat.view(ranks * shard.shape[0], *shard.shape[1:])
        if node.target is collective.reduce_scatter_tensor.default:
            given, _, ranks, group = (cast("Any", item) for item in node.args)
            whole = self.values[given]
            flat = self.buffers.summed.take(whole.numel() // ranks, whole.dtype, whole.device)
            if whole.device.type == "cpu" and exchanges(process_group_of(group), ranks):
                more = other_shares(ranks) * flat.numel()
                self._received[node] = self.buffers.flat.take(more, whole.dtype, whole.device)
            return flat.view(whole.shape[0] // ranks, *whole.shape[1:])
        if node.target is collective.all_reduce.default:
            given = self.values[node.args[0]]  # type: ignore[index]
            return given if OWN in node.meta else given.clone()
        return run_call(node, self.values.__getitem__)

    def _note(self, node: fx.Node, value: Any) -> None:
        if getattr(node.target, "namespace", None) == COLLECTIVES:
            given = storages_of(self.values[node.all_input_nodes[0]])
            whole = max(sum(given.values()), sum(storages_of(value).values()))
            self.found.collectives.append(Sent(str(node.target).split(".")[1], whole))


def where_of(node: fx.Node) -> str:
    """The module path of a call, if it is known, and its operator."""
    target = getattr(node.target, "overloadpacket", node.target)
    name = getattr(target, "__name__", str(target))
    scope = str(node.meta.get("scope") or "")
    return f"{scope}: {name}" if scope else name


def last_reads(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each call, the values that it reads last, and itself if nobody reads it.

    What a collective sends lives until somebody waits for it.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        last.setdefault(node, node)
        for source in node.all_input_nodes:
            last[source] = node
    for node in graph.nodes:
        if getattr(node.target, "namespace", None) == COLLECTIVES:
            for user in node.users:
                if user.target is collective.wait_tensor.default:
                    source = node.all_input_nodes[0]
                    last[source] = max(last[source], user, key=order.__getitem__)
    dying: dict[fx.Node, list[fx.Node]] = {}
    for value, reader in last.items():
        dying.setdefault(reader, []).append(value)
    return dying


MOVES = (Kind.RESHAPE, Kind.LAYOUT, Kind.JOIN, Kind.CAST, Kind.SPLIT, Kind.SELECTION)


def kinds_of(step: StepProgram) -> dict[fx.Node, Held]:
    """What the values of calls are held for, as far as they are no activations."""
    kinds = dict.fromkeys(parameter_expressions(step), Held.GATHERED)
    for node in _gradient_nodes(step):
        kinds.setdefault(node, Held.GRADIENTS)
    return kinds


def _gradient_nodes(step: StepProgram) -> Iterator[fx.Node]:
    """The returned gradients, or sums of them, and what they are moved, joined or reduced from."""
    seen: set[fx.Node] = set()
    returned = step.returned()
    stack = list(returned[: len(returned) - len(step.writes)])
    while stack:
        node = stack.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        yield node
        if traits_of(node).kind in MOVES or getattr(node.target, "namespace", None) == COLLECTIVES:
            stack.extend(node.all_input_nodes)
