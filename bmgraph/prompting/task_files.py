"""A task as files of an engine's folder: its plain values, and its tokenizer's JSON."""

from __future__ import annotations

import json
from typing import Any

from bmgraph.errors import BackendError, BundleError, InputError
from bmgraph.prompting.classify import VERBALIZERS, Classify
from bmgraph.prompting.generate import Generate
from bmgraph.prompting.task import Task, TaskOptions
from bmgraph.prompting.template import Template
from bmgraph.prompting.vocabulary import Vocabulary
from bmgraph.serialize.bundle import Bundle, Writer, strict_json

TASK_FILE, TOKENIZER_FILE = "task.json", "task_tokenizer.json"
ENGINE_TOKENIZER_FILE = "tokenizer.json"
"""The tokenizer that an engine generates with; a task that has the same one writes none of its own."""


def task_writers(task: Task, of_engine: str | None = None) -> dict[str, Writer]:
    """What writes the files of a task, by their names; `of_engine`: what the engine writes to `ENGINE_TOKENIZER_FILE`."""
    text, tokenizer = json.dumps(task.as_json(), indent=1, allow_nan=False), task.vocabulary.text
    writers: dict[str, Writer] = {TASK_FILE: lambda file: file.write_text(text, encoding="utf-8")}
    if tokenizer != of_engine:
        writers[TOKENIZER_FILE] = lambda file: file.write_text(tokenizer, encoding="utf-8")
    return writers


def read_task(bundle: Bundle) -> Task | None:
    """The task in a bundle, None if it has none; raises BundleError for one that is not valid, BackendError if the library of
    its tokenizer is not installed."""
    if TASK_FILE not in bundle.opened:
        return None
    own = TOKENIZER_FILE in bundle.opened
    data, tokenizer = (
        strict_json(bundle.open(TASK_FILE)),
        bundle.text(TOKENIZER_FILE if own else ENGINE_TOKENIZER_FILE),
    )
    try:
        return task_of(data, tokenizer)
    except (BundleError, BackendError):
        raise
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
        IndexError,
        RuntimeError,
    ) as error:
        raise BundleError(
            f"{TASK_FILE!r} in bundle {bundle.path} does not describe a task: {error}"
        ) from error


def task_of(data: Any, tokenizer: str) -> Task:
    """The task of plain values and its tokenizer's JSON; raises what `read_task` catches."""
    vocabulary = Vocabulary(tokenizer, dict(data["special"]), data["side"], data["longest"])
    template = Template(data["template"], vocabulary)
    options = {name: data[name] for name in ("model", *TaskOptions.__annotations__)}
    if data["kind"] == Classify.kind:
        found = data["verbalizer"]
        return Classify(template, VERBALIZERS[found["kind"]].from_json(found), **options)
    if data["kind"] == Generate.kind:
        return Generate(template, target=data["target"], **options)
    raise InputError(f"a task of kind {data['kind']!r} is not known")
