"""Times the engines of several backends in turn, on what they are for, and keeps the fastest."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bmgraph.backends.auto.times import times_in_turn
from bmgraph.errors import BackendError, BmgraphError
from bmgraph.runtime.engine_base import Engine


def race(builds: Mapping[str, Callable[[], Engine]]) -> Engine:
    """The fastest of the engines on its example, the first of equally fast ones; its report tells of the others. Engines that generate
    are timed while they do.

    A backend that raises an error of ours is left out. Raises BackendError where none is left, or the error of the only one.
    """
    engines: dict[str, Engine] = {}
    refused: dict[str, BmgraphError] = {}
    for name, build in builds.items():
        try:
            engine = build()
        except BmgraphError as error:
            refused[name] = error
            continue
        if engine.unable:
            refused[name] = BackendError(engine.unable)
        else:
            engines[name] = engine
    if not engines:
        if len(refused) == 1:
            raise next(iter(refused.values()))
        reasons = "; ".join(f"{name}: {error}" for name, error in refused.items())
        raise BackendError(f"no backend builds an engine of this program: {reasons}")
    kept, notes = _fastest(engines)
    engines[kept].report.notes += [
        *notes,
        *(f"auto: {name} is left out: {error}" for name, error in refused.items()),
    ]
    return engines[kept]


def _fastest(engines: Mapping[str, Engine]) -> tuple[str, list[str]]:
    """The name of the fastest engine, and what the report says of the race."""
    names = list(engines)
    example = engines[names[0]].example
    if len(names) == 1 or not example:
        why = (
            "no other backend builds this program"
            if len(names) == 1
            else "there is no example to time engines on"
        )
        return names[0], [f"auto: {names[0]} is taken: {why}"]
    found, _ = times_in_turn(engines)
    kept = max(names, key=found.speedup)
    runs = len(found.milliseconds[kept])
    return kept, [
        f"auto: {kept} is {found.speedup(kept, over=name):.2f} times as fast as {name} ({found.median(kept):.2f} against "
        f"{found.median(name):.2f} ms, medians of {runs} runs in turn on {found.batch})"
        for name in names
        if name != kept
    ]
