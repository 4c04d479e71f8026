"""compile: a model through passes to an engine or a trainer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, overload

import torch
from torch import nn

from bmgraph.backends import BACKENDS, resolve_backend
from bmgraph.backends.backend_base import Backend, Made
from bmgraph.backends.engine_trials import BackendTrials
from bmgraph.distributed.build_on_rank0 import lower_once
from bmgraph.distributed.connect import connect
from bmgraph.distributed.process_group import Ranks
from bmgraph.errors import BackendError, BundleError, InputError
from bmgraph.frontend.capture import Example, Prove, capture
from bmgraph.frontend.generation_example import with_attention_mask
from bmgraph.frontend.model_inputs import not_taken
from bmgraph.frontend.proof_share import WHOLE_PROOF, ProofShare, captured_by_ranks
from bmgraph.frontend.unwrap import unwrapped
from bmgraph.frontend.weights_folder import NOT_PROVEN
from bmgraph.ir.left_in_files import left_in_files
from bmgraph.ir.program import Program
from bmgraph.loading import load
from bmgraph.pass_manager.observers import Observer
from bmgraph.pass_manager.ordering import check_order, check_passes, without
from bmgraph.pass_manager.pass_base import ModelPass, Pass, StepPass
from bmgraph.pass_manager.pass_manager import PassManager, provided
from bmgraph.pass_manager.report import Report
from bmgraph.pass_manager.resume_folder import ResumeFolder, resuming
from bmgraph.pass_manager.run_settings import Verify
from bmgraph.pipeline import batches_of, check_alone, manager_of
from bmgraph.runtime.engine_base import Engine
from bmgraph.runtime.engine_check import check_engine, measure_total
from bmgraph.runtime.engine_times import measure_times
from bmgraph.runtime.generation.generate import GeneratingEngine
from bmgraph.runtime.training.trainer import Trainer
from bmgraph.serialize.bundle import read_bundle
from bmgraph.utils.collecting import old_objects_kept
from bmgraph.utils.host_memory import map_large_blocks
from bmgraph.utils.memory_budget import memory_budget
from bmgraph.utils.progress import working
from bmgraph.verify.reference_outputs import Batch, comparison_batch

if TYPE_CHECKING:
    from bmgraph.pass_manager.calibration_texts import Calibration
    from bmgraph.prompting.task import Task
    from bmgraph.runtime.generation.tokenizer import Tokenizer

AnyBackend = Backend[Engine | Trainer]

NOT_COMPARED = 'backward: not compared with the model\'s: bg.capture(..., prove="training") does'
"""The report's note on a program that trains although its backward is not known to be the model's."""

EVERY_RANK = "backend {!r} must have a `load` for its engines, or set every_rank_lowers = True"
"""What a backend lacks whose engines only rank 0 has."""

NOT_SERVED = (
    "generation: the model's own config asks for {}; engines decode greedily unless a call gives temperature=, top_p= or "
    "stop=, and do nothing else of it, so their texts differ from those of the model's generate"
)
"""The report's note on a generating engine whose model asks for more."""


@overload
def compile(
    model: nn.Module | Program, passes: Sequence[Pass] = (), *, example: Example | None = None, backend: str = "onnx",
    calibration: Calibration | None = None, resources: Mapping[str, object] | None = None,
    max_drift: float | None = None, verify: Verify = "numeric", observers: Sequence[Observer] = (),
    weights: str | Path | None = None, resume: str | PathLike[str] | None = None,
) -> Engine: ...  # fmt: skip


@overload
def compile(
    model: nn.Module | Program, passes: Sequence[Pass] = (), *, example: Example | None = None, backend: Backend[Made],
    calibration: Calibration | None = None, resources: Mapping[str, object] | None = None,
    max_drift: float | None = None, verify: Verify = "numeric", observers: Sequence[Observer] = (),
    weights: str | Path | None = None, resume: str | PathLike[str] | None = None,
) -> Made: ...  # fmt: skip


def compile(
    model: nn.Module | Program,
    passes: Sequence[Pass] = (),
    *,
    example: Example | None = None,
    backend: str | Backend[Engine | Trainer] = "onnx",
    calibration: Calibration | None = None,
    resources: Mapping[str, object] | None = None,
    max_drift: float | None = None,
    verify: Verify = "numeric",
    observers: Sequence[Observer] = (),
    weights: str | Path | None = None,
    resume: str | PathLike[str] | None = None,
) -> Engine | Trainer:
    """Take a model, or a captured program, through passes to an engine or a trainer.

    `example` is a batch as in `capture` (a program brings its own). `backend` is a name, such as "onnx" or that of another
    package's backend, or a configuration such as `Onnx(threads=2)` or `Torch(optimizer=AdamW())`; with an optimizer the
    result is a trainer. `passes` are of the model stage, then, for a trainer, of the step stage. `calibration` are batches
    (dicts of tensors by input name) for passes that measure, or, where a tokenizer is among the resources, texts, of which the
    first 48 windows of 256 tokens are taken; `resources` are what passes name, "tokenizer", with which an
    engine generates text, and "task", for which it classifies or generates (`bmgraph.prompting`). `max_drift` bounds how
    far approximate passes may move the outputs (relative L2), or the loss and gradients of a step. `weights` is a folder of
    weights for a model on the `meta` device, as in `capture`; several ranks that train read each its own shards of it
    alone. `verify` says what is checked after each pass: "numeric", what it computes; "structure", that it is legal; "off",
    nothing. `observers` are told of each pass. `resume` is a folder that keeps what passes have finished, and layers of passes that
    measure: the same call goes on there if this one is stopped, to bit-equal weights; it is locked meanwhile, refused for other
    work, and removed when an engine is built (docs/compression.md). The engine is compared with the program that it was lowered from;
    `engine.report` says what was done. Under torch.distributed all ranks call this with the same arguments: rank 0 lowers,
    the others load what it wrote.

    Raises CaptureError, OrderError (before anything runs), PassError, ResourceError, VerificationError, DriftError, BackendError,
    and InputError where the model's weights were changed after a program was captured.

    Example:
        >>> import torch, bmgraph as bg
        >>> engine = bg.compile(torch.nn.Linear(4, 2), passes=[], example=(torch.randn(3, 4),), backend="onnx")
        >>> engine.report.backend
        'onnx'
    """
    tensors = model.parameters.values() if isinstance(model, Program) else list(_weights(model))
    map_large_blocks(tensors)
    with old_objects_kept(tensors), resuming(resume) as folder:
        return _compiled(
            model,
            passes,
            example,
            backend,
            calibration,
            resources,
            max_drift,
            verify,
            observers,
            weights,
            folder,
        )


def _weights(model: object) -> Iterable[torch.Tensor]:
    return model.parameters() if isinstance(model, nn.Module) else ()


def _compiled(
    model: nn.Module | Program,
    passes: Sequence[Pass],
    example: Example | None,
    backend: str | AnyBackend,
    calibration: Calibration | None,
    resources: Mapping[str, object] | None,
    max_drift: float | None,
    verify: Verify,
    observers: Sequence[Observer],
    weights: str | Path | None,
    folder: ResumeFolder | None,
) -> Engine | Trainer:
    waits = backend.waits if isinstance(backend, Backend) else 0.0
    ranks, report = connect(waits) if waits else Ranks.here(), Report()
    begin = time.perf_counter()
    with ranks.fail_together():  # no rank waits for one that has failed
        check_alone(folder, ranks)
        config, model_passes = checked(model, passes, backend, resources or {})
        task = _task(resources)
        tokenizer = tokenizer_given(resources, task)
        trains = config.trains or any(item.will_train for item in model_passes)
    memory = next((item.memory_limit for item in model_passes if item.memory_limit is not None), None)
    capturing = partial(capture_to_compile, model, example, trains, config, weights, memory=memory)
    first = captured_by_ranks(ranks, capturing, given=isinstance(model, Program))
    if config.chooses:
        return _chosen(
            config, ranks, time.perf_counter() - begin, folder,
            partial(_compiled, first, passes, None, calibration=_again(calibration), resources=resources, max_drift=max_drift,
                    verify=verify, observers=observers, weights=None),
        )  # fmt: skip
    report.notes += _notes(first, trains, config)
    report.seconds["capture"] = time.perf_counter() - begin
    model_passes = (*with_prepended(config, first, model_passes, report), *model_passes)
    batches = batches_of(calibration, first, tokenizer)
    manager = replace(
        manager_of(observers, batches, resources, max_drift, verify, config.target, trains),
        engines=None if config.trains or ranks.size > 1 else BackendTrials(config), tell=report.notes.append,
        added=without(model_passes, passes),
    )  # fmt: skip
    begin = time.perf_counter()
    # training within a pass is collective, and fails on all ranks by itself
    with nullcontext() if any(item.will_train for item in model_passes) else ranks.fail_together():
        if folder is not None:
            folder.about["backend"] = _in_words(config)
        program = manager.run(model_passes, first, folder)
    report.seconds["passes"] = time.perf_counter() - begin
    report.records = program.history
    report.notes += folder.lines() if folder is not None else []
    lower = partial(_lower, config, program, first, report, batches, manager)
    made = lower() if config.every_rank_lowers else lower_once(ranks, lower, partial(_loaded, config))
    if tokenizer is not None and isinstance(made, GeneratingEngine):
        made.tokenizer = tokenizer
    if task is not None and isinstance(made, Engine):
        made.task = task
    return made


def _chosen(
    config: AnyBackend,
    ranks: Ranks,
    seconds: float,
    folder: ResumeFolder | None,
    compiled: Callable[..., Engine | Trainer],
) -> Engine | Trainer:
    """What a backend chooses of the engines that `compiled` makes for others; capturing took `seconds`."""
    if ranks.size > 1:
        raise InputError(
            f"backend {config.name!r} chooses by times, which each rank measures otherwise: name a backend"
        )

    def lower(choice: Backend[Engine]) -> Engine:
        made = compiled(backend=choice, folder=None if folder is None else folder.for_backend(choice.name))
        assert isinstance(made, Engine)
        return made

    chosen = config.choose(lower)
    if isinstance(chosen, Engine):
        chosen.report.seconds = {"capture": seconds, **chosen.report.seconds}
        chosen.report.notes += folder.lines() if folder is not None else []
    return chosen


def _in_words(config: AnyBackend) -> str:
    """A backend with its plain options, on which what passes measure on its engines depends."""
    options = {item.name: getattr(config, item.name) for item in fields(config)}
    plain = {
        name: value for name, value in options.items() if isinstance(value, (bool, int, float, str, tuple))
    }
    return f"{config.name} {plain}"


def _again(calibration: Calibration | None) -> Calibration | None:
    """Calibration batches that can be read several times."""
    return list(calibration) if isinstance(calibration, Iterator) else calibration


def _loaded(config: AnyBackend, path: str) -> Engine:
    """The engine that rank 0 saved, by the configuration that built it; it needs no more trust than that has."""
    found = load(path, trust=True) if config.name in BACKENDS else _by_its_own_load(config, path)
    if not isinstance(found, Engine):
        raise BackendError(
            f"rank 0 saved a {type(found).__name__} in {path}, not an engine: {EVERY_RANK.format(config.name)}"
        )
    return found


def _by_its_own_load(config: AnyBackend, path: str) -> object:
    """What a backend of another package makes of the engine that rank 0 saved."""
    bundle = read_bundle(Path(path))
    if bundle.kind != "engine":
        raise BackendError(
            f"rank 0 saved a {bundle.kind} in {path}, not an engine: {EVERY_RANK.format(config.name)}"
        )
    try:
        return config.load(bundle)
    except BundleError as error:
        raise BackendError(f"{error}; on several ranks, {EVERY_RANK.format(config.name)}") from error


def _notes(first: Program, trains: bool, config: AnyBackend) -> list[str]:
    """What the user is told of a captured program: sizes that it fixes, its backward, settings that engines do not serve."""
    notes = [*first.narrower, *(line for line in first.unproven if line.startswith(NOT_PROVEN))]
    if trains:
        notes.append(first.backward or NOT_COMPARED)
    if config.generate and first.generation.unserved:
        notes.append(NOT_SERVED.format(", ".join(first.generation.unserved)))
    return notes


def checked(
    model: nn.Module | Program,
    passes: Sequence[Pass],
    backend: str | AnyBackend,
    resources: Mapping[str, object] = MappingProxyType({}),
) -> tuple[AnyBackend, tuple[ModelPass, ...]]:
    """The backend's configuration, with the passes of its own stages, and the passes of the model stage.

    Raises OrderError where the contracts forbid the order.
    """
    config = resolve_backend(backend)
    config.check_kv_cache()
    check_passes(passes)
    has = provided(model.history) if isinstance(model, Program) else set()
    asked, passes = passes, _with_appended(passes, config.appended, has)
    check_order(
        (*passes, *config.passes), has=has, stages=config.stages, known=_all_passes, resources=resources,
        added=without(passes, asked),
    )  # fmt: skip
    later = tuple(item for item in passes if isinstance(item, StepPass))
    if later:
        config = config.with_passes(later)
    return config, tuple(item for item in passes if isinstance(item, ModelPass))


def capture_to_compile(
    model: nn.Module | Program,
    example: Example | None,
    trains: bool,
    config: AnyBackend,
    weights: str | Path | None = None,
    share: ProofShare = WHOLE_PROOF,
    memory: int | None = None,
) -> Program:
    """The captured program, of whose proof a rank makes its `share`. With `memory`, the bytes that its weights may take, those of
    files are read at each use where they do not fit.

    With `trains` its backward is compared with the model's. For a backend that generates, an example of ids alone gets a
    mask; for one whose loss is a function, inputs that forward does not take are kept for it.
    """
    if isinstance(model, Program):
        if weights is not None:
            raise InputError(
                "weights= is for a model on the meta device: a program has weights, give them to bg.capture"
            )
        return model if memory is None else left_in_files(model)
    if example is None:
        raise InputError("compile(model, ...) needs example=: a dict of inputs by name, or a tuple in order")
    if config.generate:
        example = with_attention_mask(model, example)
    unread = _read_by_loss(config.loss, unwrapped(model), example)
    with working("capturing"):
        prove: Prove = "training" if trains else True
        return capture(
            model, example, prove=prove, unread=unread, weights=weights, share=share, memory=memory
        )


def _read_by_loss(loss: object, model: nn.Module, example: Example) -> dict[str, str]:
    """The inputs of an example that only a loss reads: those that forward does not take, and those that the loss names as its own
    in `inputs`, for a forward that takes anything; each with the input whose sizes the loss says that it has, or ""."""
    if not callable(loss):
        return {}
    own = getattr(loss, "inputs", ())
    said: Mapping[str, str] = own if isinstance(own, Mapping) else dict.fromkeys(own, "")
    there = example if isinstance(example, Mapping) else {}
    return {name: said.get(name, "") for name in (*there.keys() & said.keys(), *not_taken(model, example))}


def _lower(
    config: AnyBackend,
    program: Program,
    first: Program,
    report: Report,
    calibration: Iterable[Batch] | None,
    manager: PassManager,
) -> Engine | Trainer:
    """What the backend builds of a program; an engine that runs here is compared with the program, and with the first."""
    if program.memory is not None and (config.trains or not config.streams):
        what = "a trainer" if config.trains else f"backend {config.name!r}"
        raise BackendError(
            f"Stream sets a limit of memory that {what} does not keep: leave the pass out, or compile an engine with backend='torch'"
        )
    if config.on_host and program.device.type not in ("cpu", "meta"):
        program = program.to("cpu")
    with working(f"lowering to {config.name}"):
        engine = config.build(program, report, manager)
    if isinstance(engine, Trainer):
        return engine
    size = sum(tensor.nbytes for tensor in program.parameters.values())
    if engine.unable:
        report.notes.append(f"not run, so not compared with its program: {engine.unable}")
    elif program.memory is not None and size > memory_budget():
        report.notes.append(
            f"not compared with its program: weights of {size / 1e9:.1f} GB do not fit in memory"
        )
    elif manager.verify == "numeric" and program.example:
        begin = time.perf_counter()
        batch = comparison_batch(program, calibration)
        check_engine(engine, program, batch, config.name, manager.max_drift)
        for name, other in engine.graphs.items():
            if program.at(name).example:
                check_engine(other, program.at(name), program.at(name).example, config.name)
        measure_total(engine, first, batch, calibration)
        if report.records:
            measure_times(engine, first, batch, calibration)
        report.seconds["verify"] = time.perf_counter() - begin
    return engine


def _all_passes() -> Iterable[type[Pass]]:
    from bmgraph.passes import known_passes

    return known_passes().values()


def _with_appended(passes: Sequence[Pass], appended: Sequence[ModelPass], has: set[str]) -> tuple[Pass, ...]:
    """The passes, with those that a backend appends to the model stage, as far as nothing provides the same yet."""
    there = has.union(*(item.provides for item in passes))
    end = next((index for index, item in enumerate(passes) if isinstance(item, StepPass)), len(passes))
    return (*passes[:end], *(item for item in appended if not item.provides <= there), *passes[end:])


def with_prepended(
    config: AnyBackend, program: Program, passes: Sequence[ModelPass], report: Report
) -> tuple[ModelPass, ...]:
    """The passes that a backend needs in front of the user's for this program, unless the user gave one of that kind."""
    kinds = {type(item) for item in passes}
    added = tuple(item for item in config.prepended(program) if type(item) not in kinds)
    report.notes += [
        f"{item} runs first: the {config.name} backend needs it for this program" for item in added
    ]
    return added


def _task(resources: Mapping[str, object] | None) -> Task | None:
    """`resources["task"]`; raises InputError for what is no task."""
    given = (resources or {}).get("task")
    if given is None:
        return None
    from bmgraph.prompting.task import Task

    if not isinstance(given, Task):
        raise InputError(
            f"resource 'task' is a {type(given).__name__}: give a Classify or a Generate of bmgraph.prompting"
        )
    return given


def tokenizer_given(resources: Mapping[str, object] | None, task: Task | None) -> Tokenizer | None:
    """`resources["tokenizer"]`, as engines use it, else that of a task."""
    from bmgraph.runtime.generation.tokenizer import FastTokenizer, tokenizer_of

    given = (resources or {}).get("tokenizer")
    if given is None and task is not None:
        end = task.vocabulary.special_id("eos")
        return FastTokenizer(task.vocabulary.text, () if end is None else (end,))
    return None if given is None else tokenizer_of(given)
