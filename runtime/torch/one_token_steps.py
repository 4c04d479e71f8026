"""Steps for one new position of each row on torch: in place, and on a GPU recorded for caches of a fixed size."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from bmgraph.ir.eval_form import runnable
from bmgraph.ir.program import Program
from bmgraph.lowering.one_token_step import one_token_step
from bmgraph.runtime.torch.fixed_steps import FixedStep, FixedSteps, Record, as_cuda_graph
from bmgraph.runtime.torch.held_cache import HeldCache


class OneTokenSteps:
    """The steps of a decoder: `module` takes its inputs in the order of their `names`; `fixed` are those over caches of a fixed size, None
    where none are recorded."""

    def __init__(self, module: Callable[..., Any], names: list[str], fixed: FixedSteps | None) -> None:
        self.module, self.names, self.fixed = module, names, fixed

    @staticmethod
    def of(
        program: Program, device: torch.device, record: Record | None = None, compiled: bool = False
    ) -> OneTokenSteps | None:
        """Those of a program in eval form, on the device of its tensors; None where its cache cannot be appended to in place.

        `record`: how steps over caches of a fixed size are recorded, on a GPU as CUDA graphs by default. `compiled`: by TorchInductor where they are recorded, and None where they would not be.
        """
        if record is None and device.type == "cuda":
            record = as_cuda_graph
        step = None if compiled and record is None else one_token_step(program)
        if step is None:
            return None
        fixed = None
        if step.fixed is not None and record is not None:
            module: Callable[..., Any] = runnable(program, step.fixed, False)
            if compiled:
                module = torch.compile(module, fullgraph=True, dynamic=True)
            fixed = FixedSteps(program, step, module, device, record)
        names = [spec.name for spec in program.inputs]
        return OneTokenSteps(runnable(program, step.graph, False), names, fixed)

    def of_batch(self, held: HeldCache) -> StepsOfBatch:
        """Steps over the cache of one batch."""
        return StepsOfBatch(self, held)


class StepsOfBatch:
    """Steps over one cache, and the recorded one that this cache is in, if any."""

    def __init__(self, steps: OneTokenSteps, held: HeldCache) -> None:
        self._steps, self._held = steps, held
        self._fixed: FixedStep | None = None
        self._leaves: weakref.finalize[..., Any] | None = None

    def step(self, feeds: dict[str, torch.Tensor], memories: dict[str, torch.Tensor]) -> torch.Tensor:
        """Append one position to each row, whose encoder gave `memories`; the logits f[B, 1, V], in memory that the next step may overwrite."""
        held, fixed = self._held, self._ready(feeds, memories)
        logits: torch.Tensor
        if fixed is not None:
            fixed.give(feeds, memories, held.count)
            logits = fixed()[: next(iter(held.values())).shape[0]]
            held.hold(1)
            return logits
        device = next(iter(held.values())).device
        values = {name: value.to(device) for name, value in feeds.items()} | {
            **held.with_room(1),
            **memories,
        }
        with torch.no_grad():
            logits = self._steps.module(*(values[name] for name in self._steps.names))[0]
        held.hold(1)
        if self._steps.fixed is not None:
            made = self._steps.fixed.make(held, feeds, memories, logits)
            if made is not None:
                self._use(made)
        return logits

    def _ready(self, feeds: dict[str, torch.Tensor], memories: dict[str, torch.Tensor]) -> FixedStep | None:
        """A recorded step that the cache is in, with room for one more position; None if there is none yet."""
        fixed = self._steps.fixed
        if fixed is None:
            return None
        key = fixed.key_of(self._held, feeds, memories)
        if self._fixed is None or self._fixed.key != key:
            found = fixed.take(key)
            if found is None:
                return None
            self._use(found)
        assert self._fixed is not None
        if not self._held.is_in(self._fixed.parts):  # its rows were put together or taken apart
            self._held.move_into(self._fixed.parts)
        return self._fixed

    def _use(self, found: FixedStep) -> None:
        """Let the cache be in the memory of a recorded step, until it goes on in that of another one, or nobody needs it."""
        assert self._steps.fixed is not None
        self._held.move_into(found.parts)
        if self._leaves is not None:
            self._leaves()
        self._fixed = found
        self._leaves = weakref.finalize(self, self._steps.fixed.give_back, found)
