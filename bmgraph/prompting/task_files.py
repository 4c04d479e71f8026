"""A task as files of an engine's folder: its plain values, and its tokenizer's JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bmgraph.errors import BmgraphError, BundleError
from bmgraph.prompting.classify import VERBALIZERS, Classify
from bmgraph.prompting.generate import Generate
from bmgraph.prompting.task import Task, vocabulary_of
from bmgraph.prompting.template import Template
from bmgraph.serialize.bundle import Bundle, strict_json

TASK_FILE, TOKENIZER_FILE = "task.json", "task_tokenizer.json"


def task_writers(task: Task) -> dict[str, Callable[[Path], object]]:
    """What writes the files of a task, by their names."""
    text = json.dumps(task.as_json(), indent=1, allow_nan=False)
    return {TASK_FILE: partial(_write, text), TOKENIZER_FILE: partial(_write, task.vocabulary.text)}


def _write(text: str, file: Path) -> None:
    file.write_text(text, encoding="utf-8")


def read_task(bundle: Bundle) -> Task | None:
    """The task in a bundle, None if it has none; raises BundleError for one that is not valid."""
    if TASK_FILE not in bundle.opened:
        return None
    data = strict_json(bundle.open(TASK_FILE))
    try:
        text = bundle.open(TOKENIZER_FILE).read().decode("utf-8")
        return task_of(data, text)
    except BundleError:
        raise
    except (
        BmgraphError,
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
    template = Template(data["template"], vocabulary_of(data, tokenizer))
    options = {
        name: data[name]
        for name in ("model", "max_length", "truncate", "padding", "start", "segments", "names", "output")
    }
    if data["kind"] == Classify.kind:
        found = data["verbalizer"]
        return Classify(template, VERBALIZERS[found["kind"]].from_json(found), **options)
    if data["kind"] == Generate.kind:
        return Generate(template, target=data["target"], **options)
    raise ValueError(f"a task of kind {data['kind']!r} is not known")
