"""Steps for one new position of each row, over caches of a fixed size, each recorded once as a CUDA graph.

Launched one by one, the kernels of such a step take the host longer than the device takes to run them.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from bmgraph.analysis.attention_mask import hides_padding_alone
from bmgraph.ir.cache_spec import CacheSpec
from bmgraph.ir.program import Program
from bmgraph.lowering.one_token_step import PLACE, OneTokenStep
from bmgraph.runtime.torch.held_cache import HeldCache

LEAST_POSITIONS = 128
"""The smallest cache that steps are recorded for, the place of the new position included; others are twice as large, and so on."""

MOST_IDLE = 32
"""Recorded steps that are kept at most while no batch uses them."""

IDLE_BYTES = 2**30
"""Bytes of caches that these have at most, the newest excepted."""

ROWS = (1, 2, 4, 8)
"""Rows that steps are recorded for, and multiples of the last; a batch of fewer leaves the others unread."""

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""How far logits may be from those of the step as it is, as a part of the largest one; another order of sums, by dtype."""

HALF_TOLERANCE = 5e-2

Key = tuple[Any, ...]
"""The number of positions of the cache, and (name, shape) of the other inputs."""

Run = Callable[[], Any]
Record = Callable[[Run], tuple[Callable[[], None], Any]]
"""Records what a function does on the device; gives what does it again, and the tensors that it then writes."""


class Given(NamedTuple):
    """A memory that was put where the step reads it, which nobody has written to since if it is of that version."""

    tensor: torch.Tensor
    version: int


class FixedStep:
    """One step: `parts` are the memory of its cache, `tensors` those that it reads its inputs from."""

    def __init__(
        self, key: Key, run: Callable[..., Any], tensors: dict[str, torch.Tensor], cache: CacheSpec
    ) -> None:
        self.key = key
        self.parts = {slot.past.name: tensors[slot.past.name] for slot in cache.slots}
        self.nbytes = sum(part.nbytes for part in self.parts.values())
        self._run, self._tensors, self._cache = run, tensors, cache
        self._again: Callable[[], None] | None = None
        self._logits: torch.Tensor | None = None
        self._mask = torch.zeros(0, 0)
        """The mask that the device has."""
        self._memories: dict[str, Given] = {}

    def give(self, feeds: dict[str, torch.Tensor], memories: dict[str, torch.Tensor], place: int) -> None:
        """Put the inputs of a step whose new position is the one at `place` where it reads them."""
        cache, sized = self._cache, self._cache.sized
        for name, value in feeds.items():
            if name not in sized:
                self._tensors[name][: len(value)].copy_(value)
        for name, memory in memories.items():
            known = self._memories.get(name)
            if known is None or known.version != memory._version or not known.tensor.is_set_to(memory):
                self._tensors[name][: len(memory)].copy_(memory)
                self._memories[name] = Given(memory, memory._version)
        assert cache.mask is not None
        self._give_mask(feeds[cache.mask.name], self._tensors[cache.mask.name])
        self._tensors[PLACE].fill_(place)

    def _give_mask(self, mask: torch.Tensor, there: torch.Tensor) -> None:
        """Positions that were there stand where they are, the new one is the last: none is seen between them. Rows that nobody reads see
        the new one alone."""
        (rows, count), known = (mask.shape[0], mask.shape[1] - 1), self._mask
        if known.shape == (rows, count - 1) and torch.equal(known, mask[:, : count - 1]):
            there[:rows, count - 1 : count].copy_(mask[:, count - 1 : count])
        else:
            there.zero_()
            there[:, -1] = 1
            there[:rows, :count].copy_(mask[:, :count])
        there[:rows, -1:].copy_(mask[:, count:])
        self._mask = mask[:, :count].clone()

    def record(self, record: Record) -> torch.Tensor:
        """Run it once, and record it; the logits of the run."""
        found: torch.Tensor = self._run()[0].clone()
        self._again, (self._logits, *_) = record(self._run)
        return found

    def __call__(self) -> torch.Tensor:
        """The logits f[R, 1, V] of R rows, those of the batch in front, in memory that the next run overwrites."""
        assert self._again is not None
        assert self._logits is not None
        self._again()
        return self._logits


class FixedSteps:
    """The recorded steps of a decoder: each serves one batch at a time, of so many rows and up to so many positions."""

    def __init__(
        self,
        program: Program,
        step: OneTokenStep,
        module: Callable[..., Any],
        device: torch.device,
        record: Record,
    ) -> None:
        assert program.cache is not None
        self._program, self._masks, self._module, self._device = program, step.masks, module, device
        self._record = record
        self._cache = program.cache.spec(program)
        self._idle: list[FixedStep] = []
        self._lock = threading.Lock()
        self._sizes: dict[int, bool] = {}
        """Number of positions -> whether the order of those that are held means nothing there."""
        self.refused = ""
        """Why no more steps are recorded."""

    def take(self, key: Key) -> FixedStep | None:
        """A recorded step that nobody uses; None without one."""
        with self._lock:
            for step in self._idle:
                if step.key == key:
                    self._idle.remove(step)
                    return step
        return None

    def give_back(self, step: FixedStep) -> None:
        """Let others use a step."""
        with self._lock:
            self._idle.append(step)
            del self._idle[:-MOST_IDLE]
            while len(self._idle) > 1 and sum(item.nbytes for item in self._idle) > IDLE_BYTES:
                del self._idle[0]

    def make(
        self,
        held: HeldCache,
        feeds: dict[str, torch.Tensor],
        memories: dict[str, torch.Tensor],
        logits: torch.Tensor,
    ) -> FixedStep | None:
        """Record the step that follows one which has just run, with these inputs and logits f[B, 1, V], over what is held now.

        It runs that one again, and must give its logits. None where that is not so, or where the device has no memory left for it.
        """
        key = self.key_of(held, feeds, memories)
        positions: int = key[0]
        if self.refused or not self._ordered_by_mask(positions):
            return None
        try:
            step = FixedStep(key, *self._prepared(held, feeds, memories, positions), self._cache)
            held_before = HeldCache(self._cache.slots, dict(held))
            held_before.move_into(step.parts)
            step.give(feeds, memories, held.count - 1)
            found = step.record(self._record)
        except torch.OutOfMemoryError:
            with self._lock:
                self._idle.clear()
            return None
        except RuntimeError as error:
            self._refuse(str(error).strip().partition("\n")[0][:200])
            return None
        bound = TOLERANCE.get(logits.dtype, HALF_TOLERANCE) * float(logits.abs().amax())
        apart = float((found[: len(logits)] - logits).abs().amax())
        if not apart <= bound:
            self._refuse(
                f"over a cache of fixed size, logits are {apart:.1e} from those of the step as it is"
            )
            return None
        return step

    def _refuse(self, why: str) -> None:
        self.refused = why
        warnings.warn(f"decoding runs call by call, since its step cannot be recorded: {why}", stacklevel=2)

    def key_of(
        self, held: HeldCache, feeds: dict[str, torch.Tensor], memories: dict[str, torch.Tensor]
    ) -> Key:
        """Which recorded step can run the next step of a batch."""
        rows = next(iter(held.values())).shape[0]
        shapes = [
            (name, self._shape(value, rows))
            for name, value in (feeds | memories).items()
            if name not in self._cache.sized
        ]
        return (self._size_for(held.count + 1), *shapes)

    def _shape(self, value: torch.Tensor, rows: int) -> tuple[int, ...]:
        """That of an input, for as many rows as are recorded for `rows` of them."""
        return (self._rows_for(rows) if len(value) == rows else len(value), *value.shape[1:])

    def _rows_for(self, rows: int) -> int:
        """As many, or more where the program takes any number of them."""
        if not isinstance(self._cache.tokens.shape[0], str):
            return rows
        return next((count for count in ROWS if count >= rows), -(-rows // ROWS[-1]) * ROWS[-1])

    def _size_for(self, count: int) -> int:
        """The positions of the smallest cache that holds `count` of them in front of the last one, where the new one is read."""
        size = LEAST_POSITIONS
        while size < count + 1:
            size *= 2
        return size

    def _ordered_by_mask(self, positions: int) -> bool:
        if positions not in self._sizes:
            self._sizes[positions] = all(
                hides_padding_alone(self._program, mask, positions) for mask in self._masks
            )
        return self._sizes[positions]

    def _prepared(
        self,
        held: HeldCache,
        feeds: dict[str, torch.Tensor],
        memories: dict[str, torch.Tensor],
        positions: int,
    ) -> tuple[Run, dict[str, torch.Tensor]]:
        cache, tensors = self._cache, {PLACE: torch.zeros(1, dtype=torch.int64, device=self._device)}
        rows = next(iter(held.values())).shape[0]
        for slot in cache.slots:
            shape = [self._rows_for(rows), *held[slot.past.name].shape[1:]]
            shape[slot.axis] = positions
            tensors[slot.past.name] = torch.zeros(shape, dtype=slot.past.dtype, device=self._device)
        for name, value in (feeds | memories).items():
            sizes = self._shape(value, rows)
            whole = (sizes[0], positions) if name in self._cache.sized else sizes
            tensors[name] = torch.zeros(whole, dtype=value.dtype, device=self._device)
        given = [tensors[spec.name] for spec in self._program.inputs]

        def run() -> Any:
            with torch.no_grad():
                return self._module(*given, tensors[PLACE])

        return run, tensors


def as_cuda_graph(run: Run) -> tuple[Callable[[], None], Any]:
    """Record what a function does as a CUDA graph, after it has run once; raises RuntimeError where it waits for the device."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = run()
    return graph.replay, found
