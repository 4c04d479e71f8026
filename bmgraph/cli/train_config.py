"""Reads the configuration of a training run (YAML, JSON or TOML) and checks every key and value."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from inspect import get_annotations
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from bmgraph.backends.torch.backend import Torch
from bmgraph.errors import InputError
from bmgraph.pass_manager.option_types import fits, type_in_words
from bmgraph.runtime.training.trainer import Trainer
from bmgraph.training.loss_scale import LossScale
from bmgraph.training.lr_schedules import WSD, Constant, Cosine, Exponential, Linear, Noam, Schedule
from bmgraph.training.optimizers import SGD, AdamW, Lion, Optimizer
from bmgraph.utils.did_you_mean import did_you_mean

OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw": AdamW, "sgd": SGD, "lion": Lion}
SCHEDULES: dict[str, type[Schedule]] = {
    "constant": Constant, "linear": Linear, "cosine": Cosine, "exponential": Exponential, "noam": Noam, "wsd": WSD,
}  # fmt: skip
SET_ELSEWHERE = frozenset({"optimizer", "schedule", "loss_scale", "passes", "generate", "kv_cache"})
"""Fields of `Torch` that a configuration gives in another form, or not at all."""

Made = TypeVar("Made")


@dataclass(frozen=True)
class DataConfig:
    """Where texts come from. `train`, `valid`: a text file whose documents stand between empty lines, a file of JSON lines with
    a text in `field`, or module:function, which returns batches. `length`: tokens of a row; `rows`: of a batch (of each rank
    with batch: rank); `shuffle`: documents, in each epoch. `documents`: take so many of each file only."""

    train: str
    valid: str | None = None
    field: str = "text"
    length: int = 512
    rows: int = 8
    shuffle: bool = True
    documents: int | None = None


@dataclass(frozen=True)
class TrainConfig:
    """A training run: what to train, on which data, by which backend, and the options of `Trainer.fit`.

    `weights`: a folder that a `model` without weights, of module:function, gets its weights from, as `bg.compile(weights=)` does.
    `save_delta`, `save_program`: folders that the trained deltas or the whole program are written to at the end.
    """

    model: str
    data: DataConfig
    backend: Torch[Trainer]
    passes: str
    fit: dict[str, Any]
    weights: str | None = None
    save_delta: str | None = None
    save_program: str | None = None


@dataclass(frozen=True)
class _Run:
    """The keys that are neither the backend's nor sections."""

    model: str
    steps: int
    passes: str = ""
    weights: str | None = None
    eval_every: int | None = None
    save: str | None = None
    save_every: int | None = None
    resume: str | None = None
    keep: int | None = None
    metrics: str | None = None
    tensorboard: str | None = None
    log_every: int = 10
    inspect: tuple[str, ...] = ()
    save_wait: bool = True
    best: str | None = None
    patience: int | None = None
    save_delta: str | None = None
    save_program: str | None = None


OF_FIT = (
    "steps", "eval_every", "save", "save_every", "resume", "keep", "metrics", "tensorboard", "log_every", "inspect",
    "save_wait", "best", "patience",
)  # fmt: skip
SECTIONS = ("data", "optimizer", "schedule", "loss_scale")


def read_config(file: Path) -> TrainConfig:
    """The configuration in a file. Raises InputError, naming the key, for what is unknown, missing or of another type."""
    tree = _tree(file)
    of_torch = {item.name for item in fields(Torch)} - SET_ELSEWHERE
    own = {item.name for item in fields(_Run)}
    _check_known(tree, {*own, *of_torch, *SECTIONS}, str(file))
    run = _made(_Run, {key: tree[key] for key in tree if key in own}, str(file))
    data = _made(DataConfig, _section(tree, "data", file), f"{file}, data")
    optimizer = _named(OPTIMIZERS, _section(tree, "optimizer", file, AdamW.__name__), f"{file}, optimizer")
    schedule = None
    if "schedule" in tree:
        schedule = _named(SCHEDULES, _section(tree, "schedule", file), f"{file}, schedule")
    scale = None
    if "loss_scale" in tree:
        scale = _made(LossScale, _section(tree, "loss_scale", file), f"{file}, loss_scale")
    options = {key: tree[key] for key in tree if key in of_torch}
    hints = _types(Torch)
    options = {key: _value(hints[key], value, f"{file}, {key}") for key, value in options.items()}
    make: Callable[..., Torch[Trainer]] = Torch
    backend = make(optimizer=optimizer, schedule=schedule, loss_scale=scale, **options)
    given = {key: getattr(run, key) for key in OF_FIT}
    if run.weights is not None and (":" not in run.model or Path(run.model).exists()):
        raise InputError(
            f"{file}: weights is for a model that a function makes under torch.device('meta'): give model as module:function"
        )
    return TrainConfig(
        run.model, data, backend, run.passes, given, run.weights, run.save_delta, run.save_program
    )


def _tree(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise InputError(f"there is no regular file {file}")
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            found = json.loads(text)
        elif file.suffix == ".toml":
            found = tomllib.loads(text)
        else:
            found = _yaml(text)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {file}: {str(error).splitlines()[0][:300]}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise InputError(f"{file} does not hold keys with values")
    return found


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise InputError(
            "a YAML configuration needs PyYAML: pip install pyyaml, or write JSON or TOML"
        ) from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _section(tree: Mapping[str, Any], key: str, file: Path, name: str | None = None) -> dict[str, Any]:
    """A section of keys; a text alone is its `name`, or the file to train on."""
    found = tree.get(key, name)
    if isinstance(found, str):
        return {"train" if key == "data" else "name": found}
    if found is None:
        raise InputError(f"{file} lacks {key!r}")
    if not isinstance(found, dict) or not all(isinstance(item, str) for item in found):
        raise InputError(f"{file}: {key} is {found!r}: give keys with values")
    return found


def _named(known: Mapping[str, type[Made]], section: dict[str, Any], where: str) -> Made:
    """The object whose class a section names."""
    section = dict(section)
    name = section.pop("name", None)
    if not isinstance(name, str) or name.lower() not in known:
        hint = did_you_mean(str(name).lower(), known)
        raise InputError(f"{where}: no name {name!r}{hint} (known: {', '.join(known)})")
    return _made(known[name.lower()], section, where)


def _made(kind: type[Made], given: Mapping[str, Any], where: str) -> Made:
    """A dataclass of checked values."""
    declared = {item.name: item for item in fields(kind) if item.init}  # type: ignore[arg-type]
    _check_known(given, set(declared), where)
    for name, item in declared.items():
        if name not in given and item.default is MISSING and item.default_factory is MISSING:
            raise InputError(f"{where} lacks {name!r}")
    hints = _types(kind)
    return kind(**{name: _value(hints[name], value, f"{where}, {name}") for name, value in given.items()})


def _check_known(given: Mapping[str, Any], known: set[str], where: str) -> None:
    for name in given:
        if name not in known:
            hint = did_you_mean(name, sorted(known), 0.5)
            raise InputError(f"{where}: unknown key {name!r}{hint} (known: {', '.join(sorted(known))})")


def _types(kind: type) -> dict[str, Any]:
    found = {}
    for base in reversed(kind.__mro__):
        for name in get_annotations(base):
            found[name] = _hint(base, name)
    return found


def _hint(base: type, name: str) -> Any:
    """The type of one field: others of its class may name types that are only there for type checkers."""
    alone = type(
        "Alone", (), {"__annotations__": {name: base.__annotations__[name]}, "__module__": base.__module__}
    )
    try:
        return get_type_hints(alone)[name]
    except NameError:
        return object


def _value(annotation: Any, value: Any, where: str) -> Any:
    """A value of the annotated type: lists are tuples, and YAML reads 3e-4 as a text."""
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, str) and float in (annotation, *get_args(annotation)):
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, str) and annotation == tuple[str, ...]:
        value = (value,)
    if not fits(value, annotation):
        raise InputError(f"{where} is {value!r}: give {type_in_words(annotation)}")
    return value
