"""replay: the recorded passes of a saved program or engine, run again on a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import groupby
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING

from torch import nn

from bmgraph.backends import resolve_backend
from bmgraph.errors import BundleError, InputError, ResourceError, VerificationError
from bmgraph.frontend.capture import Example, capture
from bmgraph.frontend.capture_methods import capture_methods
from bmgraph.frontend.unwrap import unwrapped
from bmgraph.ir.pass_record import VERSION, Record, machine
from bmgraph.ir.program import FORWARD, Program
from bmgraph.pass_manager.context import CALIBRATION
from bmgraph.pass_manager.pass_spec import parse_passes
from bmgraph.pass_manager.target import TORCH, Target
from bmgraph.passes import known_passes
from bmgraph.pipeline import Pipeline
from bmgraph.serialize.bundle import Bundle, read_bundle, strict_json
from bmgraph.serialize.safetensors_io import read_tensors
from bmgraph.utils.digest import same_weights

if TYPE_CHECKING:
    from bmgraph.pass_manager.calibration_texts import Calibration


def replay(
    bundle: str | Path,
    model: nn.Module | Program,
    *,
    calibration: Calibration | None = None,
    resources: Mapping[str, object] | None = None,
    examples: Mapping[str, Example] | None = None,
) -> Program:
    """Run the passes recorded in a saved program or engine again, on a model.

    On the same machine, versions and threads (all recorded) and the same resources, the weights come out bit-equal. A program
    of several methods (`capture_methods`) is captured again with the examples that it was saved with; an engine is not saved
    with those of all methods: give `examples`, as `capture_methods` takes them.

    Raises InputError where examples are missing, ResourceError where a resource is not the recorded one, VerificationError where the weights differ, with what
    differs between then and now.
    """
    saved = read_bundle(Path(bundle))
    _check_not_exchanged(saved)
    records = _records(saved)
    known = known_passes()
    asked = [record for record in records if not record.within]
    parsed = [
        (name, [item for record in same for item in parse_passes(record.text, known, recorded=True)])
        for name, same in groupby(asked, key=lambda record: record.target)
    ]
    added = {name for record in records for name in record.inputs}
    program = model if isinstance(model, Program) else _captured(saved, model, added, examples)
    done = program
    for name, passes in parsed:
        done = Pipeline(passes).run(
            done, calibration=calibration, resources=resources, target=_target(name, saved)
        )
    given = {*(resources or {}), *(() if calibration is None else (CALIBRATION,))}
    for record, again in zip(records, done.history[len(done.history) - len(records) :]):
        for name, recorded in record.resources.items():
            only_searched = (
                name in given and name not in again.resources
            )  # earlier versions recorded that too
            if again.resources.get(name) != recorded and not only_searched:
                raise ResourceError(
                    f"resource {name!r} is not the one that {record.text} was recorded with: give the same contents"
                )
    if not same_weights(saved.manifest.get("weights"), done):
        then, now = (records[-1].machine if records else {}), machine()
        changed = ", ".join(
            f"{key} {then.get(key)} -> {now[key]}" for key in now if then.get(key) != now[key]
        )
        raise VerificationError(
            f"the replayed weights differ from the saved ones ({changed or 'the model is another one'})"
        )
    return done


def _check_not_exchanged(saved: Bundle) -> None:
    """Raise InputError for an engine whose deltas were exchanged while it ran, of which its history does not tell."""
    deltas = saved.manifest.get("deltas")
    if isinstance(deltas, dict) and deltas.get("changed"):
        raise InputError(
            f"the deltas of {saved.path} were exchanged while its engine ran ({', '.join(map(str, deltas.get('names', [])))[:200]}), "
            "which its passes do not repeat: replay an engine that was saved before"
        )


def _captured(
    saved: Bundle, model: nn.Module, added: Collection[str], examples: Mapping[str, Example] | None
) -> Program:
    """The model's program, of all methods that were captured; `added` are inputs that passes added."""
    if examples is not None:
        return capture_methods(model, examples)
    kept = read_tensors(saved.open("example.safetensors"))
    methods = [name for name in _graphs(saved) if _is_method(model, name)]
    own: dict[str, Example] = {
        graph: {
            name.removeprefix(f"{graph}."): value
            for name, value in kept.items()
            if name.startswith(f"{graph}.") and name.removeprefix(f"{graph}.") not in added
        }
        for graph in methods
    }
    missing = [graph for graph, example in own.items() if not example]
    if missing:
        raise InputError(
            f"{saved.path} was made of the methods {FORWARD} and {' and '.join(methods)}, and holds no example of {missing[0]!r}: "
            "give examples={method: its inputs by name}, as bg.capture_methods takes them"
        )
    others = tuple(f"{graph}." for graph in _graphs(saved))
    main = {name: value for name, value in kept.items() if name not in added and not name.startswith(others)}
    return capture_methods(model, {**own, FORWARD: main}) if own else capture(model, main)


def _is_method(model: nn.Module, name: str) -> bool:
    """Whether a graph can be that of a method; graphs that passes make have names of modules, or none that the model has."""
    return isinstance(getattr(type(unwrapped(model)), name, None), FunctionType)


def _graphs(saved: Bundle) -> list[str]:
    """The names of the graphs of a saved program or engine besides `forward`."""
    source = saved.manifest if saved.kind == "engine" else strict_json(saved.open("program.json"))
    graphs = source.get("graphs", {}) if isinstance(source, dict) else {}
    return [name for name in graphs if name != FORWARD] if isinstance(graphs, dict) else []


def _target(text: str, saved: Bundle) -> Target:
    """The target that a recorded pass was run for, as it was then."""
    name, _, version = text.partition(VERSION)
    try:
        newest: Target = TORCH if name == TORCH.name else resolve_backend(name).target
        target = newest.at(version or "1")
    except InputError as error:
        raise BundleError(f"{saved.path} was made for an unknown target: {error}") from error
    return target


def _records(saved: Bundle) -> tuple[Record, ...]:
    """The history of a saved program or engine."""
    source = saved.manifest if saved.kind == "engine" else strict_json(saved.open("program.json"))
    try:
        return tuple(Record.from_json(item) for item in source["history"])
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{saved.path} holds no history: {error}") from error
