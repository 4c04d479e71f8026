"""TorchEngine: a program that runs on torch, behind the same calls as every engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bmgraph.ir.cache_spec import CacheSpec, cache_spec
from bmgraph.ir.input_check import check_inputs
from bmgraph.ir.program import Program
from bmgraph.pass_manager.report import Report
from bmgraph.runtime.generation.generate import Generates
from bmgraph.runtime.generation.sampling import Array


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
        self.encoder = TorchEngine(program.encoder, Report()) if program.encoder is not None else None
        self._module = program.module()
        cache = cache_spec(self.inputs, self.outputs, self.ranges)
        self._decoder = TorchDecoder(program, self._module, cache) if cache else None

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
    """A program with a cache, and its module."""

    def __init__(self, program: Program, module: nn.Module, cache: CacheSpec) -> None:
        self.cache = cache
        self.source = program.encoder.inputs if program.encoder is not None else ()
        self._program, self._module = program, module
        self._encoder = program.encoder.module() if program.encoder is not None else None

    def begin(self, rows: int, source: Mapping[str, Array]) -> TorchSteps:
        """An empty cache for a batch, whose encoder has read `source`."""
        device = self._program.device
        held = {name: value.to(device) for name, value in self.cache.empty(rows).items()}
        if self._encoder is not None:
            given = _tensors(source, device)
            with torch.no_grad():
                made = self._encoder(*(given[spec.name] for spec in self.source))
            held |= dict(zip((spec.name for spec in self.cache.memories), made))
        return TorchSteps(self._module, self.cache, [spec.name for spec in self._program.inputs], held)


class TorchSteps:
    """One generation on a module; `held` is what it reads at every step beside the tokens."""

    def __init__(
        self, module: nn.Module, cache: CacheSpec, names: list[str], held: dict[str, torch.Tensor]
    ) -> None:
        self._module, self._cache, self._names, self._held = module, cache, names, held

    def step(self, feeds: Mapping[str, Array]) -> Array:
        """Read new tokens behind those in the cache; the logits f[B, V] after the last one."""
        given = {**_tensors(feeds, next(iter(self._held.values())).device), **self._held}
        with torch.no_grad():
            logits, *presents = self._module(*(given[name] for name in self._names))
        self._held |= {slot.past.name: value for slot, value in zip(self._cache.slots, presents)}
        found: Array = logits[:, -1].float().cpu().numpy()
        return found


def _tensors(arrays: Mapping[str, Array], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(value)).to(device) for name, value in arrays.items()}
