"""Reads the weights of one run in the order of their use, on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import TracebackType

import torch

from bmgraph.runtime.torch.stream.schedule import Schedule, Unit, Use
from bmgraph.runtime.torch.stream.weight_memory import WeightMemory
from bmgraph.utils.stored_tensor import Source

AHEAD = 64 * 2**20
"""Bytes that the system is told of before they are read, so that it has several reads to do at a time."""


class Reader:
    """Within it a thread reads, as far ahead as the schedule's capacity allows; it has ended on exit, whatever happened.

    `take` waits for the next use, and raises what reading raised (BundleError for a file that was cut or changed).
    """

    def __init__(self, schedule: Schedule, memory: WeightMemory, sources: Mapping[str, Source]) -> None:
        self._schedule, self._memory, self._sources = schedule, memory, sources
        self._changed = threading.Condition()
        self._loaded: dict[Use, torch.Tensor] = {}
        self._buffers: dict[Use, torch.Tensor] = {}
        self._error: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._read_all, name="bmgraph-stream")

    def __enter__(self) -> Reader:
        self._memory.begin(self._schedule)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()
        self._loaded.clear()
        self._buffers.clear()
        self._memory.end()

    def take(self, use: Use) -> torch.Tensor:
        """The bytes of a use, u8[n], until `drop`."""
        with self._changed:
            while use not in self._loaded:
                if self._error is not None:
                    raise self._error
                self._changed.wait()
            return self._loaded[use]

    def drop(self, use: Use) -> None:
        """Let the memory of a use be used again, unless it stays."""
        with self._changed:
            del self._loaded[use]
            buffer = self._buffers.pop(use, None)
            if buffer is not None:
                self._memory.give_back(buffer)
                self._changed.notify_all()

    def _read_all(self) -> None:
        reads = [use.unit for use in self._schedule.reads if use.unit not in self._schedule.stays]
        told = ahead = 0
        try:
            for use in self._schedule.reads:
                unit = use.unit
                held = self._memory.stays.get(unit)
                if held is None:
                    while told < len(reads) and ahead < AHEAD:
                        self._sources[reads[told].name].will_fill(*self._span(reads[told]))
                        ahead += reads[told].bytes
                        told += 1
                    held = self._buffer(use)
                    if held is None:
                        return
                    begin, _ = self._span(unit)
                    self._sources[unit.name].fill(held.numpy().data, begin)
                    ahead -= 0 if unit in self._schedule.stays else unit.bytes
                with self._changed:
                    if self._stopped:
                        return
                    if unit in self._schedule.stays:
                        self._memory.stays[unit] = held
                    self._loaded[use] = held
                    self._changed.notify_all()
        except BaseException as error:  # raised where the values are asked for
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _span(self, unit: Unit) -> tuple[int, int]:
        """The first byte of a unit in its tensor, and the one behind it."""
        begin = unit.first * (unit.bytes // max(1, unit.rows))
        return begin, begin + unit.bytes

    def _buffer(self, use: Use) -> torch.Tensor | None:
        """Memory to read into, as soon as there is room; None if the run has ended."""
        if use.unit in self._schedule.stays:
            return self._memory.keep(use.unit)
        with self._changed:
            while not self._stopped:
                buffer = self._memory.take(use.unit)
                if buffer is not None:
                    self._buffers[use] = buffer
                    return buffer[: use.unit.bytes]
                self._changed.wait()
        return None
