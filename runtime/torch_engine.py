"""TorchEngine: a program that runs on torch, behind the same calls as every engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bmgraph.caching.spec import CacheSpec, cache_spec
from bmgraph.program import Program
from bmgraph.report import Report
from bmgraph.runtime.generate import Generates
from bmgraph.runtime.sampling import Array
from bmgraph.signature import TensorSpec, check_inputs


class TorchEngine(Generates):
    """A program in eval form on torch: call it with the inputs by name, get the outputs by name.

    It stays a program (`engine.program`), which more passes can take; `save` writes that. Obtain one from
    `bmgraph.compile(..., backend="torch")`.

    Example:
        >>> import torch, bmgraph as bg
        >>> engine = bg.compile(torch.nn.Linear(4, 2), example=(torch.randn(3, 4),), backend="torch")
        >>> engine(input=torch.randn(5, 4))["output"].shape
        torch.Size([5, 2])
    """

    def __init__(self, program: Program, report: Report) -> None:
        self.program = program
        self.report = report
        self.inputs, self.outputs, self.ranges = program.inputs, program.outputs, program.ranges
        self._module = program.module()
        cache = cache_spec(self.inputs, self.outputs, self.ranges)
        self._decoder = TorchDecoder(self._module, cache, self.inputs, program.device) if cache else None

    def __call__(self, **batch: object) -> dict[str, torch.Tensor]:
        """Run the program; raises InputError for a wrong name, dtype or shape before anything runs."""
        checked = check_inputs(self.inputs, self.ranges, batch)
        with torch.no_grad():
            values = self._module(*checked.values())
        return dict(zip((spec.name for spec in self.outputs), values))

    def decoder(self) -> TorchDecoder | None:
        """What generates; None where the program has no cache."""
        return self._decoder

    def save(self, path: str | Path) -> None:
        """Write the program as a bundle that `bmgraph.load` reads; raises BundleError where it cannot."""
        self.program.save(str(path))

    def __repr__(self) -> str:
        names = ", ".join(spec.name for spec in self.outputs)
        return f"<TorchEngine on {self.program.device}: {', '.join(map(str, self.inputs))} -> {names}>"


class TorchDecoder:
    """A module whose graph has a cache."""

    def __init__(
        self, module: nn.Module, cache: CacheSpec, inputs: tuple[TensorSpec, ...], device: torch.device
    ) -> None:
        self.cache = cache
        self._module, self._device = module, device
        self._names = [spec.name for spec in inputs]

    def begin(self, rows: int) -> TorchSteps:
        """An empty cache for a batch."""
        empty = {name: value.to(self._device) for name, value in self.cache.empty(rows).items()}
        return TorchSteps(self._module, self.cache, self._names, empty)


class TorchSteps:
    """One generation on a module."""

    def __init__(
        self, module: nn.Module, cache: CacheSpec, names: list[str], past: dict[str, torch.Tensor]
    ) -> None:
        self._module, self._cache, self._names, self._past = module, cache, names, past

    def step(self, feeds: Mapping[str, Array]) -> Array:
        """Read new tokens behind those in the cache; the logits f[B, V] after the last one."""
        device = next(iter(self._past.values())).device
        given = {
            name: torch.from_numpy(np.ascontiguousarray(value)).to(device) for name, value in feeds.items()
        }
        given |= self._past
        with torch.no_grad():
            logits, *presents = self._module(*(given[name] for name in self._names))
        self._past = {slot.past.name: value for slot, value in zip(self._cache.slots, presents)}
        found: Array = logits[:, -1].float().cpu().numpy()
        return found
