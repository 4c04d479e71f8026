"""TorchEngine: a program that runs on torch with the interface of an engine."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bmgraph.deltas.row_tables import find_row_tables
from bmgraph.errors import BackendError, BundleError, InputError
from bmgraph.ir.graph_order import graphs_beside
from bmgraph.ir.program import Program
from bmgraph.pass_manager.report import Report
from bmgraph.runtime.engine_base import Engine
from bmgraph.runtime.generation.generate import GeneratingEngine
from bmgraph.runtime.live_deltas import LiveDeltas
from bmgraph.runtime.torch.compiled_graph import CompiledGraph
from bmgraph.runtime.torch.decoder import TorchDecoder
from bmgraph.runtime.torch.one_token_steps import OneTokenSteps
from bmgraph.runtime.torch.split import Devices
from bmgraph.runtime.torch.stream.place import DevicePlace, HostPlace, Place
from bmgraph.runtime.torch.stream.schedule import Schedule
from bmgraph.runtime.torch.stream.streamed_graph import StreamedGraph
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
        steps = None
        if cache is not None and devices is not None and memory is None and len(devices.places) == 1:
            self._device = devices.places[0]
            steps = OneTokenSteps.of(devices.placed(program), self._device)
        elif cache is not None and memory is None and devices is None:
            steps = OneTokenSteps.of(program, self._device, compiled=compiled)
        self._decoder = (
            TorchDecoder(program, self._module, cache, self.feeders(), form, self._device, steps)
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
