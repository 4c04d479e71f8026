"""The files of a saved ONNX Runtime engine, and how they are written."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bmgraph.deltas.peft_format import COMPUTATION
from bmgraph.prompting.task_files import ENGINE_TOKENIZER_FILE, task_writers
from bmgraph.runtime.generation.tokenizer import FastTokenizer
from bmgraph.runtime.manifest import describe
from bmgraph.serialize.bundle import Writer, write_bundle
from bmgraph.serialize.safetensors_io import write_tensors

if TYPE_CHECKING:
    from bmgraph.runtime.openvino.engine import OpenVinoEngine
    from bmgraph.runtime.ort.engine import OrtEngine

MODEL_FILE = "model.onnx"
EXAMPLE_FILE = "example.safetensors"


GRAPHS = "graphs"
"""Key of what the manifest says of the engines of other graphs, by name, in the order in which they run."""


DELTAS, TABLES = "deltas", "tables"
"""Keys of what the manifest says of deltas among which rows choose, and of the inputs of a model that are tables of them."""

DELTAS_FILE = "deltas.safetensors"

CHAT = "chat"
"""Key of what the manifest says of the tokenizer's chat template."""


def graph_file(name: str) -> str:
    """The file of the model of another graph than the main one."""
    return f"{name}.graph.onnx"


def described(engine: OrtEngine | OpenVinoEngine) -> dict[str, object]:
    """The entries of a manifest on an engine, with those of its inputs that no caller gives."""
    tables = engine.tables.names
    return {**describe(engine), **({TABLES: tables} if tables else {})}


def save_engine(engine: OrtEngine, path: Path) -> None:
    """Write an engine as a bundle; raises BundleError if it cannot be written, and then leaves nothing behind."""
    write_bundle(path, "engine", *engine_files(engine))


def engine_files(engine: OrtEngine | OpenVinoEngine) -> tuple[dict[str, object], dict[str, Writer]]:
    """The manifest of an engine of ONNX models, and what writes its files.

    A task, and a tokenizer of the `tokenizers` library (one JSON file), are saved too; other tokenizer objects are not.
    """
    writers: dict[str, Writer] = {}
    text: str | None = None
    for part in (*engine.graphs.values(), engine):
        for name in part.files.opened:
            writers[name] = partial(part.files.copy, name)
    manifest = described(engine)
    if engine.graphs:
        manifest[GRAPHS] = {name: described(part) for name, part in engine.graphs.items()}
    if engine.live is not None:
        form = replace(engine.live.form, names=engine.live.slots)
        manifest[DELTAS] = {**form.as_json(), "changed": engine.live.changed}
        tensors, computation = engine.live.taken(), json.dumps(form.computation.as_json(), indent=1)
        writers[DELTAS_FILE] = lambda file: write_tensors(file, tensors)
        writers[COMPUTATION] = lambda file: file.write_text(computation, encoding="utf-8")
    if engine.decoder() is not None:
        manifest["generation"] = engine.generation.as_json()
    if isinstance(engine.tokenizer, FastTokenizer):
        entries, text = tokenizer_entries(engine.tokenizer)
        manifest |= entries
        writers[ENGINE_TOKENIZER_FILE] = partial(write_text, text)
    if engine.task is not None:
        writers |= task_writers(engine.task, text)
    writers[EXAMPLE_FILE] = lambda file: write_tensors(file, engine.example)
    return manifest, writers


def tokenizer_entries(tokenizer: FastTokenizer) -> tuple[dict[str, object], str]:
    """What a manifest says of a tokenizer, and the text of its file."""
    chat = {} if tokenizer.chat is None else {CHAT: tokenizer.chat.as_json()}
    return {"ends": list(tokenizer.eos_ids), **chat}, tokenizer.text


def write_text(text: str, file: Path) -> None:
    """Write a text to a file."""
    file.write_text(text, encoding="utf-8")
