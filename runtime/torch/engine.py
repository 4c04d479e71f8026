"""TorchEngine: a program that runs on torch with the interface of an engine."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from bmgraph.deltas.row_tables import RowTables, find_row_tables
from bmgraph.errors import BackendError, BundleError, InputError
from bmgraph.ir.cache_spec import CacheSpec
from bmgraph.ir.graph_order import graphs_beside
from bmgraph.ir.omitted_inputs import Feeder, inputs_of, outputs_of
from bmgraph.ir.program import Program
from bmgraph.pass_manager.report import Report
from bmgraph.runtime.engine_base import Engine
from bmgraph.runtime.generation.batching.held_positions import HeldPositions, joined
from bmgraph.runtime.generation.batching.joining import unfit_for_joining
from bmgraph.runtime.generation.generate import GeneratingEngine
from bmgraph.runtime.generation.sampling import Array
from bmgraph.runtime.live_deltas import LiveDeltas
from bmgraph.runtime.torch.compiled_graph import CompiledGraph
from bmgraph.runtime.torch.split import Devices
from bmgraph.runtime.torch.stream.place import DevicePlace, HostPlace, Place
from bmgraph.runtime.torch.stream.schedule import Schedule
from bmgraph.runtime.torch.stream.streamed_graph import StreamedGraph, size_at
from bmgraph.runtime.torch.stream.weight_files import files_of
from bmgraph.runtime.torch.stream.weight_memory import WeightMemory
from bmgraph.runtime.torch.tables import compacted, narrowed, with_own_tables
from bmgraph.serialize.program_bundle import save_program


class TorchEngine(GeneratingEngine):
    """A program in eval form on torch: call it with the inputs by name, get the outputs by name.

    `engine.program` is the program, which can go through more passes; `save` writes it. Obtain an engine from
    `bmgraph.compile(..., backend="torch")`.

    Example:
        >>> import torch, bmgraph as bg
        >>> engine = bg.compile(torch.nn.Linear(4, 2), example=(torch.randn(3, 4),), backend="torch")
        >>> engine(input=torch.randn(5, 4))["output"].shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        program: Program,
        report: Report,
        graphs: Mapping[str, Engine] | None = None,
        memory: WeightMemory | None = None,
        devices: Devices | None = None,
        compiled: bool = False,
    ) -> None:
        if devices is not None and program.memory is not None and len(devices.places) > 1:
            raise BackendError(
                f"Stream runs on one device: name it in Torch(devices=), which names {len(devices.places)}, or leave Stream out"
            )
        if compiled and (devices is not None or program.memory is not None):
            other = "Stream" if devices is None else "Torch(devices=)"
            raise BackendError(
                f"{other} runs call by call, and Torch(torch_compile=True) fuses calls: leave one of the two out"
            )
        if program.memory is not None and memory is None:
            memory = WeightMemory(program.memory, _place_of(devices, program.memory))
            program = files_of(program)
        self._memory = memory
        form = self._form = find_row_tables(program)
        if form is not None and devices is not None:
            raise BackendError(
                "Torch(devices=) does not move deltas that can be exchanged: leave devices= out, or merge the deltas"
            )
        if form is not None and graphs is None:
            program = with_own_tables(program, form)
        super().__init__(
            program.inputs,
            program.outputs,
            program.ranges,
            report,
            example=program.example,
            ignored=program.ignored,
            cache=program.cache,
            graphs=_engines_beside(program, memory, devices, compiled, report) if graphs is None else graphs,
        )
        self._program = program
        self._device = program.device if memory is None else memory.place.device
        self.generation = program.generation
        always = [] if form is None else [item.name for item in form.tables]
        self._module: Callable[..., Any]
        if memory is not None:
            self._module = StreamedGraph(program, memory, always)
        elif devices is not None:
            self._module = devices.module(program, report)
        else:
            self._module = CompiledGraph(program, bool(always)) if compiled else program.module()
        if isinstance(self._module, CompiledGraph):
            report.notes.append(self._module.summary())
        if isinstance(self._module, StreamedGraph) and self._module.example_schedule is not None:
            report.notes.append(f"stream: {self._module.example_schedule.summary()}, with the example")
        cache = program.cache.spec(program) if program.cache is not None else None
        self._decoder = (
            TorchDecoder(program, self._module, cache, self.feeders(), form, self._device)
            if cache is not None
            else None
        )
        if form is not None and graphs is None:
            tables = {item.name: program.parameters[item.name] for item in form.tables}
            self.live = LiveDeltas(form, tables, (self, *self.graphs.values()))

    @property
    def program(self) -> Program:
        """The program; a copy with the deltas that are there now, where they were exchanged."""
        exchanged = self.live is not None and self.live.changed
        return compacted(self._program, self.live) if exchanged and self.live is not None else self._program

    def __call__(self, **batch: object) -> dict[str, torch.Tensor]:
        """Run the program, on its own device (with `Torch(devices=)` on those) wherever the inputs are; the outputs stay there.

        Raises InputError for a wrong name, dtype or shape before anything runs.
        """
        with self.holding_deltas(batch) as given:
            checked = narrowed(self._form, self.checked(given))
            with torch.no_grad():
                values = self._module(*(value.to(self._device) for value in checked.values()))
        return dict(zip((spec.name for spec in self.outputs), values))

    def schedule(self, **batch: object) -> Schedule:
        """What stays in memory in a call with such a batch, what is read in which order, and the predicted peak; prints as text.

        Raises InputError for an engine without a limit of memory (the pass `Stream`), a batch that does not fit its inputs, and one that does not
        fit into the limit.
        """
        if not isinstance(self._module, StreamedGraph):
            raise InputError("this engine has no limit of memory: compile with Stream(memory=...)")
        checked = narrowed(self._form, self.checked(batch))
        return self._module.schedule(tuple(tuple(value.shape) for value in checked.values()))

    def has_room_for(self, batch: Mapping[str, object]) -> bool:
        """Whether a batch fits into the limit of memory, if there is one."""
        if not isinstance(self._module, StreamedGraph):
            return True
        checked = self.checked(batch)
        try:
            self._module.schedule(tuple(tuple(value.shape) for value in checked.values()))
        except InputError:
            return False
        return True

    def decoder(self) -> TorchDecoder | None:
        """What the decode loop runs on; None if the program has no KV cache."""
        return self._decoder

    def save(self, path: str | Path) -> None:
        """Write the program as a bundle for `bmgraph.load`; raises BundleError if it cannot be written, or the engine has a task,
        which a program does not hold. It holds no tokenizer either, of which a UserWarning tells."""
        if self.task is not None:
            raise BundleError(
                "a torch engine is saved as its program, which holds no task: compile with backend='onnx' to save both, or save "
                "engine.program"
            )
        save_program(self.program, path)
        if self.tokenizer is not None:
            warnings.warn(
                "a torch engine is saved as its program, which holds no tokenizer: give it again to bg.compile, as "
                "resources={'tokenizer': ...}, or compile with backend='onnx' to save both",
                stacklevel=2,
            )

    def __repr__(self) -> str:
        return f"<TorchEngine on {self._device}: {self.signature()}>"


def _place_of(devices: Devices | None, limit: int) -> Place:
    """Where weights within a limit of memory are used; raises BackendError for a device with less."""
    if devices is None or devices.places[0].type == "cpu":
        return HostPlace()
    place, free = devices.places[0], devices.left[0]
    if limit > free:
        raise BackendError(
            f"Stream(memory=...) allows {limit:,} bytes, and {place} has {free:,} left: give Stream less"
        )
    return DevicePlace(place)


def _engines_beside(
    program: Program, memory: WeightMemory | None, devices: Devices | None, compiled: bool, report: Report
) -> dict[str, Engine]:
    """Engines of the program's other graphs, each with those that run before it; `report` is told which devices these are on."""
    found: dict[str, Engine] = {}
    for entry in graphs_beside(program):
        beside = Report()
        found[entry.entry] = TorchEngine(entry, beside, dict(found), memory, devices, compiled)
        if devices is not None:
            report.notes += beside.notes
    return found


class TorchDecoder:
    """Decodes with a program that has a KV cache, and with the graphs that give its memories, such as an encoder."""

    def __init__(
        self,
        program: Program,
        module: Callable[..., Any],
        cache: CacheSpec,
        feeders: Sequence[Feeder],
        form: RowTables | None,
        device: torch.device,
    ) -> None:
        self.cache, self._device = cache, device
        self.encoder_inputs = inputs_of(feeders)
        self._program, self._module, self._feeders, self._form = program, module, feeders, form

    @property
    def no_joining(self) -> str:
        """Why rows of states cannot be put together; empty if they can."""
        return unfit_for_joining(self.cache)

    rows_end_apart = False  # attention takes a mask, and reads all positions

    wide_form = None

    def for_batching(self, wide: bool) -> Self:
        """Itself: all steps run alike."""
        return self

    def start(self, batch_size: int, encoder_feeds: Mapping[str, Array], most: int) -> TorchDecodeState:
        """An empty cache for a batch, which grows to `most` positions at most; the graphs that give the memories run on
        `encoder_feeds`."""
        device = self._device
        cached = {name: value.to(device) for name, value in self.cache.empty(batch_size).items()}
        memories = outputs_of(self._feeders, encoder_feeds)
        cached |= {spec.name: memories[spec.name] for spec in self.cache.memories}
        if isinstance(self._module, StreamedGraph):
            self._module.schedule(self._last_shapes(batch_size, cached, most))
        return TorchDecodeState(
            self._module, self.cache, [spec.name for spec in self._program.inputs], cached, self._form
        )

    def _last_shapes(
        self, rows: int, cached: Mapping[str, torch.Tensor], most: int
    ) -> tuple[tuple[int, ...], ...]:
        """The shapes of all inputs at a step with one new position, the last of `most`."""
        sizes = {str(self.cache.tokens.shape[0]): rows, str(self.cache.tokens.shape[1]): 1}
        sizes |= {str(slot.past.shape[slot.axis]): max(0, most - 1) for slot in self.cache.slots}
        if self.cache.scored is not None:
            sizes[str(self.cache.scored.shape[0])] = 1
        for spec in self.cache.memories:
            sizes |= {str(dim): size for dim, size in zip(spec.shape, cached[spec.name].shape)}
        return tuple(tuple(size_at(dim, sizes, 1) for dim in spec.shape) for spec in self._program.inputs)


class TorchDecodeState:
    """The KV cache and encoder outputs of one batch; `names` are the module's inputs in order."""

    def __init__(
        self,
        module: Callable[..., Any],
        cache: CacheSpec,
        names: list[str],
        cached: dict[str, torch.Tensor],
        form: RowTables | None,
    ) -> None:
        self._module, self._cache, self._names, self._cached = module, cache, names, cached
        self._form = form

    def step(self, feeds: Mapping[str, Array]) -> Array:
        """Append new tokens to the cache; returns the logits f[B, V] after the last one."""
        given = _tensors(feeds, next(iter(self._cached.values())).device)
        values = {**narrowed(self._form, given), **self._cached}
        with torch.no_grad():
            logits, *presents = self._module(*(values[name] for name in self._names))
        self._cached |= {slot.past.name: present for slot, present in zip(self._cache.slots, presents)}
        last: Array = logits[:, -1].float().cpu().numpy()
        return last

    def reorder(self, rows: Array) -> None:
        """Let each row go on with the cache of another one: row i with that of rows[i], i64[B]."""
        for slot in self._cache.slots:
            held = self._cached[slot.past.name]
            self._cached[slot.past.name] = held[torch.from_numpy(rows).to(held.device)]

    def repeat_rows(self, each: int) -> None:
        """Let each row be followed by `each` - 1 others that hold what it holds."""
        rows = next(iter(self._cached.values())).shape[0]
        self.reorder(np.arange(rows).repeat(each))

    def reserve(self, rows: int, most: int) -> None:
        """Nothing: this cache takes memory as it grows."""

    def join(self, other: Self) -> None:
        """Take the rows of another state behind those that are there, their last positions at one place."""
        for slot in self._cache.slots:
            own, new = (state._cached[slot.past.name] for state in (self, other))
            longest = max(own.shape[slot.axis], new.shape[slot.axis])
            both = [_behind_zeros(item, slot.axis, longest - item.shape[slot.axis]) for item in (own, new)]
            self._cached[slot.past.name] = torch.cat(both)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Let only these rows go on, in this order."""
        self.reorder(np.array(rows, np.int64))

    def forget_front(self, count: int) -> None:
        """Take the first `count` positions from the cache of all rows."""
        self._keep_positions(slice(count, None))

    def forget(self, count: int) -> None:
        """Take the last `count` positions from the cache of all rows."""
        self._keep_positions(slice(-count))

    def _keep_positions(self, kept: slice) -> None:
        for slot in self._cache.slots:
            index = (*[slice(None)] * slot.axis, kept)
            self._cached[slot.past.name] = self._cached[slot.past.name][index].clone()

    def positions(self, row: int, begin: int, end: int) -> HeldPositions:
        """A copy of what the cache holds of a row from one position to another."""
        slots = self._cache.slots
        held = (self._cached[slot.past.name][row : row + 1] for slot in slots)
        whole = HeldPositions(tuple(held), tuple(slot.axis for slot in slots))
        return whole.part(begin, end).copied()

    def begin_with(self, parts: Sequence[HeldPositions]) -> None:
        """Let an empty cache of one row hold these positions."""
        for slot, whole in zip(self._cache.slots, joined(parts)):
            self._cached[slot.past.name] = whole


def _behind_zeros(values: torch.Tensor, axis: int, count: int) -> torch.Tensor:
    """What a slot holds, behind `count` positions of zeros."""
    if not count:
        return values
    front = values.new_zeros([count if place == axis else size for place, size in enumerate(values.shape)])
    return torch.cat([front, values], axis)


def _tensors(arrays: Mapping[str, Array], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(value)).to(device) for name, value in arrays.items()}
