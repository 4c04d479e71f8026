"""Compares the speed of several forms of one model: interleaved runs, medians and speed-ups."""

from __future__ import annotations

import inspect
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bmgraph.errors import InputError
from bmgraph.ir.omitted_inputs import inputs_of, with_fed
from bmgraph.ir.pass_record import machine
from bmgraph.ir.program import FORWARD, Program
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
    graph: str | None = None,
) -> Comparison:
    """Time contestants on one batch, in turn, each round in another order: `warmup` rounds that do not count, then `runs` that do.

    A contestant is a model, program or engine that takes the batch by name, or a function without arguments. Of a program or
    engine of several graphs, by default all that the batch asks for is timed: the main graph, and those that feed it, unless
    the batch holds what they give. With `graph`, that graph alone is timed (of a model the method of that name): what other
    graphs feed into it is computed once, before. Speed-ups are relative to `base`, by default the first contestant. `pause` is the time between runs in seconds. Models run in
    eval mode, and get the modes of their modules back. A run on a GPU ends when the GPU has finished it.

    Raises InputError if there is no contestant, if `base` is not one of them, if `runs` is below 1, or if one does not have
    the graph.

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
    if graph is not None:
        batch = _with_fed_values(contestants.values(), batch, graph)
    calls = {name: _call(item, batch, graph) for name, item in contestants.items()}
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffled = list(calls), Random(0)
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
            order = shuffled.sample(
                order, len(order)
            )  # threads of who ran last may still spin: not always in front of the same
    sizes = ", ".join(f"{name} {list(value.shape)}" for name, value in batch.items())
    return Comparison(base, milliseconds, sizes if graph is None else f"graph {graph}: {sizes}")


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


def _with_fed_values(
    contestants: Iterable[Contestant], batch: Mapping[str, torch.Tensor], graph: str
) -> dict[str, torch.Tensor]:
    """The batch with what other graphs give to `graph`, as the first program or engine that has them computes it."""
    found = dict(batch)
    for item in contestants:
        if isinstance(item, (Program, Engine)):
            own = _at(item, graph)
            known = {spec.name for spec in (*own.inputs, *inputs_of(own.feeders()))}
            given = {name: value for name, value in found.items() if name in known}
            found |= {
                name: value
                for name, value in with_fed(own.feeders(), own.inputs, given).items()
                if isinstance(value, torch.Tensor)
            }
    return found


def _at(item: Program | Engine, graph: str) -> Program | Engine:
    """One graph of a program or engine; raises InputError for an unknown name."""
    if isinstance(item, Program):
        return item.at(graph)
    if graph == FORWARD:
        return item
    if graph not in item.graphs:
        raise InputError(f"no graph is called {graph!r}: the engine has {', '.join((FORWARD, *item.graphs))}")
    return item.graphs[graph]


def _call(item: Contestant, batch: Mapping[str, torch.Tensor], graph: str | None) -> Callable[[], object]:
    """A function without arguments that runs a contestant, or one graph of it, on the batch."""
    if isinstance(item, nn.Module):
        method = item if graph in (None, FORWARD) else getattr(item, str(graph), None)
        if not callable(method):
            raise InputError(f"a {type(item).__name__} has no method {graph!r}")
        taken = batch if graph is None else _taken(item if method is item else method, batch)

        def run_model() -> object:
            with torch.inference_mode():
                return method(**taken)

        return run_model
    if isinstance(item, (Program, Engine)):
        engine = item if graph is None else _at(item, graph)
        specs = engine.inputs if graph is not None else (*engine.inputs, *inputs_of(engine.feeders()))
        names = {spec.name for spec in specs}
        accepted = {name: value for name, value in batch.items() if name in names}
        return lambda: engine(**accepted)
    if not callable(item):
        raise InputError(
            f"a contestant is a {type(item).__name__}: expected a model, program, engine or function"
        )
    return item


def _taken(method: Callable[..., object], batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a method takes of a batch that may hold more."""
    parameters = inspect.signature(method.forward if isinstance(method, nn.Module) else method).parameters
    if any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values()):
        return dict(batch)
    return {name: value for name, value in batch.items() if name in parameters}
