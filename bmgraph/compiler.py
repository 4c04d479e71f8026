"""compile, load and replay: the only file that sees core, passes, backends and runtime together."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from bmgraph.distributed.build_on_rank0 import lower_once
from bmgraph.distributed.process_group import Ranks
from bmgraph.errors import BundleError, InputError, ResourceError, VerificationError
from bmgraph.frontend.capture import Example, capture
from bmgraph.ir.pass_record import Record, machine
from bmgraph.ir.program import Program
from bmgraph.pass_manager.ordering import check_order, check_passes
from bmgraph.pass_manager.pass_base import Pass
from bmgraph.pass_manager.pass_manager import Observer, Pipeline, Verify, provided
from bmgraph.pass_manager.report import Report
from bmgraph.pass_manager.target import TORCH, Target
from bmgraph.serialize.bundle import Bundle, read_bundle, strict_json
from bmgraph.utils.digest import digest
from bmgraph.utils.progress import working
from bmgraph.verify.engine_check import check_engine, measure_total
from bmgraph.verify.reference_outputs import Batch, comparison_batch

if TYPE_CHECKING:
    from bmgraph.runtime.generation.tokenizer import Tokenizer

ENGINES: dict[str, tuple[str, tuple[str, ...]]] = {
    "onnx": ("bmgraph.runtime.ort.bundle", ("providers", "threads")),
    "tensorrt": ("bmgraph.runtime.tensorrt.bundle", ()),
}
"""Backend of a saved engine -> the module whose `load_engine` reads it, and the options that this takes."""


def compile(
    model: nn.Module | Program,
    passes: Sequence[Pass] = (),
    *,
    example: Example | None = None,
    backend: Any = "onnx",
    calibration: Iterable[Batch] | None = None,
    resources: Mapping[str, Any] | None = None,
    max_drift: float | None = None,
    verify: Verify = "numeric",
    observers: Sequence[Observer] = (),
) -> Any:
    """Take a model, or a program that was captured before, through passes to an engine, or to a trainer.

    `example` is a batch as in `capture` (a program brings its own). `backend` is "onnx" or a configuration such as
    `Onnx(threads=2)` or `Torch(optimizer=AdamW())`, which gives a trainer. `calibration` are batches (dicts of
    tensors by input name) for passes that measure; `resources` are what passes name, and "tokenizer", with which an
    engine generates text. `max_drift` bounds how far approximate passes may move the outputs (relative L2). The engine
    is compared with the program that it was lowered from; `engine.report` tells what was done. Where torch.distributed
    was started all ranks call this alike: rank 0 lowers, and the others load what it made.

    Raises CaptureError, OrderError (before anything runs), PassError, VerificationError, DriftError, BackendError.

    Example:
        >>> import torch, bmgraph as bg
        >>> engine = bg.compile(torch.nn.Linear(4, 2), passes=[], example=(torch.randn(3, 4),), backend="onnx")
        >>> engine.report.backend
        'onnx'
    """
    config = resolve_backend(backend)
    check_passes(passes)
    program_has = provided(model) if isinstance(model, Program) else set()
    passes = _with_appended(passes, getattr(config, "appended", ()), program_has)
    tokenizer = _tokenizer(resources)
    check_order(
        (*passes, *getattr(config, "passes", ())), has=program_has, stages=config.stages, known=_all_passes
    )
    later = tuple(item for item in passes if item.acts_on != "model")
    if later:
        config = replace(config, passes=(*later, *config.passes))
    begin = time.perf_counter()
    if isinstance(model, Program):
        program = model
    elif example is None:
        raise InputError("compile(model, ...) needs example=: a dict of inputs by name, or a tuple in order")
    else:
        with working("capturing"):
            program = capture(model, example)
    first = program
    report = Report()
    report.seconds["capture"] = time.perf_counter() - begin
    begin = time.perf_counter()
    program = Pipeline(passes[: len(passes) - len(later)], observers).run(
        program,
        calibration=calibration,
        resources=resources,
        max_drift=max_drift,
        verify=verify,
        target=config.target,
    )
    report.seconds["passes"] = time.perf_counter() - begin
    report.records = program.history
    lower = partial(_lower, config, program, first, report, calibration, verify)
    alone = getattr(config, "every_rank_lowers", False)
    made = lower() if alone else lower_once(Ranks.here(), lower, load)
    if tokenizer is not None:
        made.tokenizer = tokenizer
    return made


def _lower(
    config: Any,
    program: Program,
    first: Program,
    report: Report,
    calibration: Iterable[Batch] | None,
    verify: Verify,
) -> Any:
    """What the backend makes of a program, held against it where it is an engine that runs here."""
    from bmgraph.runtime.training.trainer import Trainer

    with working(f"lowering to {config.name}"):
        engine: Any = config.build(program, report)
    if isinstance(engine, Trainer):
        return engine
    unable = getattr(engine, "unable", "")
    if unable:
        report.notes.append(f"not run, so not compared with its program: {unable}")
    elif verify == "numeric" and program.example:
        begin = time.perf_counter()
        batch = comparison_batch(program, calibration)
        check_engine(engine, program, batch, config.name)
        if program.encoder is not None:
            check_engine(engine.encoder, program.encoder, program.encoder.example, config.name)
        measure_total(engine, first, batch)
        report.seconds["verify"] = time.perf_counter() - begin
    return engine


def _all_passes() -> Iterable[type[Pass]]:
    from bmgraph.passes import known_passes

    return known_passes().values()


def _with_appended(passes: Sequence[Pass], appended: Sequence[Pass], has: set[str]) -> tuple[Pass, ...]:
    """The passes, with those that a backend needs, and that give what is not there yet, behind the ones of the model
    stage."""
    there = has.union(*(item.provides for item in passes))
    first = next((place for place, item in enumerate(passes) if item.acts_on != "model"), len(passes))
    return (*passes[:first], *(item for item in appended if not item.provides <= there), *passes[first:])


def _tokenizer(resources: Mapping[str, Any] | None) -> Tokenizer | None:
    """What an engine turns text into ids with: `resources["tokenizer"]`."""
    from bmgraph.runtime.generation.tokenizer import tokenizer_of

    given = (resources or {}).get("tokenizer")
    return None if given is None else tokenizer_of(given)


def default_trainer() -> Any:
    """How passes train where the resource "trainer" does not say it."""
    from bmgraph.backends.torch.backend import Torch
    from bmgraph.training.optimizers import AdamW

    return Torch(optimizer=AdamW())


def resolve_backend(backend: Any) -> Any:
    """A backend's configuration from its name or itself; raises InputError for anything else."""
    from bmgraph.backends import BACKENDS

    if isinstance(backend, str):
        if backend not in BACKENDS:
            raise InputError(f"no backend is called {backend!r}: choose one of {', '.join(sorted(BACKENDS))}")
        module, kind = BACKENDS[backend]
        return getattr(import_module(module), kind)()
    if not hasattr(backend, "build") or not hasattr(backend, "stages"):
        raise InputError(
            f"backend={backend!r} is neither a name ({', '.join(sorted(BACKENDS))}) nor a backend's configuration"
        )
    return backend


def replay(
    bundle: str | Path,
    model: nn.Module | Program,
    *,
    calibration: Iterable[Batch] | None = None,
    resources: Mapping[str, Any] | None = None,
) -> Program:
    """Run the passes recorded in a saved program or engine again, on a model.

    On the same machine, versions and threads (all recorded) and the same resources, the weights come out bit-equal.
    Raises ResourceError where a resource is not the recorded one, VerificationError where the weights differ, with what
    differs between then and now.
    """
    from bmgraph.pass_manager.pass_spec import parse_passes
    from bmgraph.passes import known_passes
    from bmgraph.serialize.safetensors_io import read_tensors

    saved = read_bundle(Path(bundle))
    records = _records(saved)
    known = known_passes()
    asked = [record for record in records if not record.within]
    parsed = [
        (name, [item for record in same for item in parse_passes(record.text, known)])
        for name, same in groupby(asked, key=lambda record: record.target)
    ]
    added = {name for record in records for name in record.inputs}
    example = read_tensors(saved.file("example.safetensors"))
    program = (
        model
        if isinstance(model, Program)
        else capture(model, {name: value for name, value in example.items() if name not in added})
    )
    done = program
    for name, passes in parsed:
        done = Pipeline(passes).run(
            done, calibration=calibration, resources=resources, target=_target(name, saved)
        )
    for record, again in zip(records, done.history[len(done.history) - len(records) :]):
        for name, recorded in record.resources.items():
            if again.resources.get(name) != recorded:
                raise ResourceError(
                    f"resource {name!r} is not the one that {record.text} was recorded with: give the same contents"
                )
    if saved.manifest.get("weights") != digest(done):
        then, now = (records[-1].machine if records else {}), machine()
        changed = ", ".join(
            f"{key} {then.get(key)} -> {now[key]}" for key in now if then.get(key) != now[key]
        )
        raise VerificationError(
            f"the replayed weights differ from the saved ones ({changed or 'the model is another one'})"
        )
    return done


def _target(name: str, saved: Bundle) -> Target:
    """The target that a recorded pass was run for."""
    try:
        target: Target = TORCH if name == TORCH.name else resolve_backend(name).target
    except InputError as error:
        raise BundleError(f"{saved.path} was made for an unknown target: {error}") from error
    return target


def _records(saved: Bundle) -> tuple[Record, ...]:
    """The history of a saved program or engine."""
    source = saved.manifest if saved.kind == "engine" else strict_json(saved.file("program.json"))
    try:
        return tuple(Record.from_json(item) for item in source["history"])
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{saved.path} holds no history: {error}") from error


def load(path: str | Path, **options: Any) -> Any:
    """The Program or Engine that was saved in a folder.

    `options` are an ONNX engine's `providers` and `threads`. Nothing is unpickled or evaluated; raises BundleError for a
    folder that is truncated, altered, foreign or hostile, BackendError for an engine of other hardware.
    """
    bundle = read_bundle(Path(path))
    if bundle.kind == "delta":
        raise BundleError(f"{path} holds a delta: put it on its backbone with the passes LoadDelta or Deltas")
    if bundle.kind == "program":
        from bmgraph.serialize.program_bundle import load_program

        if options:
            raise InputError(f"a program takes no {', '.join(options)}")
        return load_program(bundle)
    if bundle.kind == "trainer":
        raise InputError(
            f"{path} is a checkpoint of training: compile the same program again and give it to trainer.load"
        )
    backend = str(bundle.manifest.get("backend"))
    if backend not in ENGINES:
        raise BundleError(
            f"{bundle.path} holds an engine of backend {backend!r}: expected {' or '.join(ENGINES)}"
        )
    module, known = ENGINES[backend]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise InputError(f"an engine of backend {backend} takes no {', '.join(unknown)}")
    return import_module(module).load_engine(bundle, **options)
