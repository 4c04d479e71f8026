"""Runs the eval form of a program's entry within a limit of memory, with weights read from their files ahead of their use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from bmgraph.errors import BackendError, InputError
from bmgraph.ir.eval_form import eval_form
from bmgraph.ir.program import Program, copy_graph, output_node, placeholders
from bmgraph.ir.shape_inference import creates_tensor
from bmgraph.ir.symbolic_dim import SymbolicDim
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of
from bmgraph.runtime.torch.stream.activation_memory import LiveBytes
from bmgraph.runtime.torch.stream.reader import Reader
from bmgraph.runtime.torch.stream.schedule import Schedule, Use, plan, smallest
from bmgraph.runtime.torch.stream.step_run import StepRun, Weights
from bmgraph.runtime.torch.stream.steps import Step, Steps, aliased_by_outputs, make_steps, row_leaves
from bmgraph.runtime.torch.stream.weight_memory import WeightMemory
from bmgraph.utils.stored_tensor import Source, StoredTensor, in_memory
from bmgraph.utils.torch_internals import planning_mode, python_dispatcher

SMALL = 64 * 2**10
"""Tensors of at most so many bytes are always in memory."""

LARGEST_PART, SMALLEST_PART = 16, 64 * 2**10
"""A weight is used in parts above one of LARGEST_PART parts of the limit; parts get smaller, down to SMALLEST_PART bytes, where the
limit needs it."""

KEPT_SCHEDULES = 64

ROUNDED = 16
"""Lengths are rounded up to a multiple of it for a schedule."""

Shapes = tuple[tuple[int, ...], ...]


class StreamedGraph:
    """The entry of a program as a function of its inputs, in their order, that returns the outputs.

    Every call has a schedule for the sizes of its inputs: what stays in memory, and in which order the rest is read. Raises BackendError where
    the program's example does not fit into the limit of the `memory`; a call raises InputError where its sizes do not, and BundleError
    where a file was cut or changed.
    """

    def __init__(self, program: Program, memory: WeightMemory, always: Iterable[str] = ()) -> None:
        if program.device.type != "cpu":
            raise BackendError(
                f"Stream reads weights from files, and those of the program are on {program.device}: capture the model on the CPU or "
                f"the meta device, and name the device that runs it, Torch(devices={str(program.device)!r})"
            )
        self._program, self._memory, self._device = program, memory, memory.place.device
        graph = copy_graph(program.graph)
        eval_form(graph, len(program.outputs))
        for node in graph.nodes:
            if node.op == "call_function" and creates_tensor(node):
                node.update_kwarg("device", self._device)
        names = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        stay = aliased_by_outputs(graph).union(always)
        tensors = {name: program.tensor(name) for name in sorted(names)}
        self._streamed: dict[str, StoredTensor] = {
            name: tensor
            for name, tensor in tensors.items()
            if isinstance(tensor, StoredTensor) and tensor.nbytes > SMALL and name not in stay
        }
        self._sources: dict[str, Source] = {name: tensor.source for name, tensor in self._streamed.items()}
        self._held = {
            name: in_memory(tensor).detach().to(self._device)
            for name, tensor in tensors.items()
            if name not in self._streamed
        }
        self._way = memory.place.way(self._sources.values())
        self._held_bytes = sum(tensor.nbytes for tensor in self._held.values())
        self._held_bytes += memory.place.landing_bytes * bool(self._sources)
        self._graph = graph
        self._inputs = [placeholders(graph)[spec.name] for spec in program.inputs]
        self._outputs: Any = output_node(graph).args[0]
        self._steps: dict[int, Steps] = {}
        self._schedules: dict[Shapes, tuple[Schedule, Steps]] = {}
        shapes = (
            tuple(tuple(program.example[spec.name].shape) for spec in program.inputs)
            if program.example
            else ()
        )
        self.example_schedule: Schedule | None = None
        if shapes:
            self.example_schedule = self._scheduled(shapes, BackendError, "the example")[0]

    @property
    def held_bytes(self) -> int:
        """Bytes of small tensors and buffers, which are always in memory."""
        return self._held_bytes

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The outputs."""
        schedule, steps = self._schedule_for(tuple(tuple(item.shape) for item in inputs))
        with self._memory.running, Reader(schedule, self._memory, self._sources) as reader, torch.no_grad():
            placed = [item.to(self._device) for item in inputs]
            return self._run(steps, placed, _FileWeights(self._streamed, reader, self._device), self._held)

    def schedule(self, shapes: Shapes) -> Schedule:
        """What a call with inputs of these shapes keeps and reads; raises InputError where it does not fit into the limit."""
        return self._schedule_for(shapes)[0]

    def _run(
        self, steps: Steps, inputs: Sequence[torch.Tensor], weights: Weights, held: Mapping[str, torch.Tensor],
        live: LiveBytes | None = None,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        values: dict[fx.Node, Any] = dict(zip(self._inputs, inputs))
        run = StepRun(steps, values, weights, held, simulated=live is not None)
        for index, step in enumerate(steps.steps):
            if live is not None:
                live.inside = self._inside(step)
            run.step(index)
        return tuple(
            held[str(item.target)] if item.op == "get_attr" else values[item] for item in self._outputs
        )

    def _inside(self, step: Step) -> int:
        """Bytes that a CPU's kernels take for a step: those of half precision put weights in another order first."""
        if self._device.type != "cpu":
            return 0
        row = traits_of(step.node)
        if row.kind not in (Kind.LINEAR, Kind.BATCHED_PRODUCT, Kind.CONVOLUTION):
            return 0
        operands = [
            item.meta["val"]
            for item in step.node.all_input_nodes
            if isinstance(item.meta.get("val"), torch.Tensor)
        ]
        if not any(item.dtype in (torch.bfloat16, torch.float16) for item in operands):
            return 0
        weight = step.node.args[1]
        if not isinstance(weight, fx.Node) or row_leaves(weight) is None:
            return 0
        size = int(weight.meta["val"].numel()) * weight.meta["val"].element_size()
        count = int(weight.meta["val"].shape[0])
        part = count if step.rows is None else step.rows[1] - step.rows[0]
        return int(size * part // max(1, count))

    def _schedule_for(self, shapes: Shapes) -> tuple[Schedule, Steps]:
        rounded = _rounded(self._program, shapes)
        try:
            return self._scheduled(rounded, InputError, "")
        except InputError:
            if rounded == shapes:
                raise
        return self._scheduled(shapes, InputError, "")

    def _scheduled(
        self, shapes: Shapes, error: type[InputError] | type[BackendError], what: str
    ) -> tuple[Schedule, Steps]:
        found = self._schedules.get(shapes)
        if found is not None:
            return found
        limit, piece = self._memory.limit, max(SMALLEST_PART, self._memory.limit // LARGEST_PART)
        while True:
            steps = self._steps_of(piece)
            activations = self._activations(steps, shapes)
            made = plan(
                steps.uses, limit, self._held_bytes, activations, self._way, self._memory.place.gives_back
            )
            if made is not None:
                break
            if piece <= SMALLEST_PART:
                text = ", ".join(
                    f"{spec.name} {'x'.join(map(str, shape))}"
                    for spec, shape in zip(self._program.inputs, shapes)
                )
                least = smallest(steps.uses, self._held_bytes, activations)
                raise error(
                    f"Stream(memory=...) allows {limit:,} bytes; {what or 'a call'} with {text[:300]} needs at least {least:,} "
                    f"({activations:,} of them for activations and a cache): give Stream at least that, or smaller batches"
                )
            piece = max(SMALLEST_PART, piece // 4)
        while len(self._schedules) >= KEPT_SCHEDULES:
            self._schedules.pop(next(iter(self._schedules)))
        self._schedules[shapes] = made, steps
        return made, steps

    def _steps_of(self, piece: int) -> Steps:
        if piece not in self._steps:
            whole = [name for name, source in self._sources.items() if source.read_whole]
            self._steps[piece] = make_steps(self._graph, self._streamed, piece, whole)
        return self._steps[piece]

    def _activations(self, steps: Steps, shapes: Shapes) -> int:
        """Bytes of inputs and of what a run computes, predicted without reading weights."""
        with planning_mode() as mode:
            weights = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
                for name, tensor in self._streamed.items()
            }
            held = {name: mode.from_tensor(tensor) for name, tensor in self._held.items()}
            inputs = [
                torch.empty(shape, dtype=spec.dtype, device=self._device)
                for spec, shape in zip(self._program.inputs, shapes)
            ]
            given = sum(item.nbytes for item in inputs)
            others = {**weights, **held, **{str(number): item for number, item in enumerate(inputs)}}
            with LiveBytes(others) as live, python_dispatcher(), torch.no_grad():
                self._run(steps, inputs, _FakeWeights(weights), held, live)
        return int(given + live.peak + self._memory.place.kernels)


class _FileWeights:
    """Values of streamed weights as a reader reads them, on a device."""

    def __init__(self, streamed: Mapping[str, StoredTensor], reader: Reader, device: torch.device) -> None:
        self._streamed, self._reader, self._device = streamed, reader, device

    def take(self, use: Use) -> torch.Tensor:
        """The values in the reader's buffer."""
        tensor = self._streamed[use.unit.name]
        shape = (use.unit.rows, *tensor.shape[1:]) if tensor.dim() else ()
        return self._reader.take(use).view(tensor.dtype).reshape(shape)

    def drop(self, use: Use) -> None:
        """Let the buffer be used again."""
        self._reader.drop(use)

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """The rows, read one after the other."""
        tensor = self._streamed[name]
        found = torch.empty((len(ids), *tensor.shape[1:]), dtype=tensor.dtype)
        size = found[:1].nbytes
        into = found.reshape(-1).view(torch.uint8).numpy().data
        numbers = ids.tolist()
        for number in numbers:  # so that the disk reads several at a time
            tensor.source.will_fill(number * size, (number + 1) * size)
        for place, number in enumerate(numbers):
            tensor.source.fill(into[place * size : (place + 1) * size], number * size)
        return found.to(self._device)


class _FakeWeights:
    """Weights without data, in the places of those that are read."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self._weights = weights

    def take(self, use: Use) -> torch.Tensor:
        """A part of the weight, which takes no memory of its own."""
        whole = self._weights[use.unit.name]
        return whole[use.unit.first : use.unit.first + use.unit.rows] if whole.dim() else whole

    def drop(self, use: Use) -> None:
        """Nothing."""

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """As many rows as there are ids."""
        return self._weights[name].new_empty((len(ids), *self._weights[name].shape[1:]))


def _rounded(program: Program, shapes: Shapes) -> Shapes:
    """Shapes that are longer behind their first axis, few enough that calls which grow by one have few schedules; the same where longer
    ones are not allowed."""
    exact: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for spec, shape in zip(program.inputs, shapes):
        for axis, (dim, size) in enumerate(zip(spec.shape, shape)):
            if isinstance(dim, str) and dim.isidentifier():
                exact[dim] = size
                if axis:
                    high = program.ranges[dim].high if dim in program.ranges else None
                    sizes[dim] = (
                        _rounded_up(size) if high is None else max(size, min(_rounded_up(size), high))
                    )
    for name, bounds in program.ranges.items():
        total = SymbolicDim.of(name)
        names = [] if total is None else [item for item in total.names if item in sizes]
        if (
            total is not None
            and bounds.high is not None
            and set(total.names) <= exact.keys()
            and len(names) > 1
        ) and total.at({**exact, **sizes}) > bounds.high:
            longest = max(names, key=exact.__getitem__)
            room = bounds.high - total.at(exact)
            sizes |= {item: exact[item] for item in names}
            sizes[longest] = min(_rounded_up(exact[longest]), exact[longest] + max(0, room))
    found = tuple(
        tuple(size_at(dim, {**exact, **sizes}, size) for dim, size in zip(spec.shape, shape))
        for spec, shape in zip(program.inputs, shapes)
    )
    larger = all(new >= old for one, two in zip(found, shapes) for new, old in zip(one, two))
    return found if larger else shapes


def size_at(dim: int | str, sizes: Mapping[str, int], otherwise: int) -> int:
    """A size of an input, given the sizes that it depends on; `otherwise` if they are not all known."""
    if isinstance(dim, int):
        return dim
    symbolic = SymbolicDim.of(dim)
    known = symbolic is not None and set(symbolic.names) <= sizes.keys()
    return symbolic.at(sizes) if symbolic is not None and known else otherwise


def _rounded_up(size: int) -> int:
    """A multiple of ROUNDED, or from eight times that on a size with at most three leading bits: up to a quarter more."""
    step = max(ROUNDED, 1 << max(0, size.bit_length() - 3))
    return -(-size // step) * step
