"""Compares the speed of several forms of one model: interleaved runs, medians and speed-ups."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bmgraph.errors import InputError
from bmgraph.ir.pass_record import machine
from bmgraph.ir.program import Program
from bmgraph.runtime.engine_base import Engine
from bmgraph.utils.progress import track

if TYPE_CHECKING:
    from rich.table import Table

Contestant = nn.Module | Program | Engine | Callable[[], object]

PAUSE = 0.03
"""Seconds between runs. With a shorter pause the thread pools of two libraries disturb each other."""


@dataclass
class Comparison:
    """Milliseconds of each run of each contestant; speed-ups are relative to `base`."""

    base: str
    milliseconds: dict[str, list[float]]
    batch: str
    machine: dict[str, str] = field(default_factory=machine)

    def median(self, name: str) -> float:
        """Median time of a contestant, in milliseconds."""
        return statistics.median(self.milliseconds[name])

    def speedup(self, name: str, over: str | None = None) -> float:
        """How many times faster a contestant is than `over` (default: the base): the median of the ratios per round."""
        reference = self.milliseconds[over or self.base]
        return statistics.median(slow / fast for fast, slow in zip(self.milliseconds[name], reference))

    def as_json(self) -> dict[str, Any]:
        """Medians, quartiles and speed-ups, with a description of the machine."""
        rows = {
            name: {
                "median_ms": self.median(name),
                "quartiles_ms": statistics.quantiles(runs, n=4) if len(runs) > 1 else runs * 3,
                "runs": len(runs),
                "speedup": self.speedup(name),
            }
            for name, runs in self.milliseconds.items()
        }
        return {"batch": self.batch, "base": self.base, "contestants": rows, "machine": self.machine}

    def save(self, path: str | Path) -> None:
        """Write `as_json` to a file."""
        Path(path).write_text(json.dumps(self.as_json(), indent=2) + "\n", encoding="utf-8")

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title=f"{self.batch}; medians of interleaved runs", title_justify="left")
        table.add_column("contestant")
        for name in ("ms", "quartiles", f"speed-up over {self.base}"):
            table.add_column(name, justify="right")
        for name, row in self.as_json()["contestants"].items():
            low, _, high = row["quartiles_ms"]
            table.add_row(
                name, f"{row['median_ms']:.2f}", f"{low:.2f} to {high:.2f}", f"{row['speedup']:.2f}x"
            )
        return table

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        text = StringIO()
        Console(file=text, width=110, no_color=True).print(self)
        return text.getvalue().rstrip()


def benchmark(
    contestants: Mapping[str, Contestant],
    batch: Mapping[str, torch.Tensor],
    *,
    runs: int = 20,
    warmup: int = 3,
    pause: float = PAUSE,
    base: str | None = None,
) -> Comparison:
    """Time contestants on one batch, in turn: `warmup` rounds that do not count, then `runs` rounds that do.

    A contestant is a model, program or engine that takes the batch by name, or a function without arguments. Speed-ups
    are relative to `base`, by default the first contestant. `pause` is the time between runs in seconds. Models run in
    eval mode, and get the modes of their modules back. A run on a GPU ends when the GPU has finished it.

    Raises InputError if there is no contestant, if `base` is not one of them or if `runs` is below 1.

    Example:
        >>> import torch, bmgraph as bg
        >>> model = torch.nn.Linear(4, 2)
        >>> result = bg.benchmark({"eager": model, "again": model}, {"input": torch.randn(3, 4)}, runs=2, pause=0)
        >>> sorted(result.milliseconds)
        ['again', 'eager']
    """
    if not contestants:
        raise InputError("benchmark needs at least one contestant")
    if runs < 1:
        raise InputError(f"runs={runs}: give at least 1")
    base = base or next(iter(contestants))
    if base not in contestants:
        raise InputError(f"base={base!r} is not a contestant: choose one of {', '.join(contestants)}")
    calls = {name: _call(item, batch) for name, item in contestants.items()}
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    with _evaluating([item for item in contestants.values() if isinstance(item, nn.Module)]):
        for turn in track(range(warmup + runs), "benchmarking", warmup + runs):
            for name in order:
                time.sleep(pause)
                _finish()
                begin = time.perf_counter()
                calls[name]()
                _finish()
                spent = time.perf_counter() - begin
                if turn >= warmup:
                    milliseconds[name].append(spent * 1e3)
            order = order[1:] + order[:1]  # so that no contestant always starts the round
    sizes = ", ".join(f"{name} {list(value.shape)}" for name, value in batch.items())
    return Comparison(base, milliseconds, sizes)


@contextmanager
def _evaluating(models: Sequence[nn.Module]) -> Iterator[None]:
    """Within it, models are in eval mode; each module gets its own mode back."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _finish() -> None:
    """Wait until the GPU has done what was asked of it, if there is one in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def _call(item: Contestant, batch: Mapping[str, torch.Tensor]) -> Callable[[], object]:
    """A function without arguments that runs a contestant on the batch."""
    if isinstance(item, nn.Module):

        def run_model() -> object:
            with torch.inference_mode():
                return item(**batch)

        return run_model
    if isinstance(item, (Program, Engine)):
        engine = item
        names = {spec.name for spec in item.inputs}
        accepted = {name: value for name, value in batch.items() if name in names}
        return lambda: engine(**accepted)
    if not callable(item):
        raise InputError(
            f"a contestant is a {type(item).__name__}: expected a model, program, engine or function"
        )
    return item
