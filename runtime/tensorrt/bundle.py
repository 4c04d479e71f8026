"""The files of a saved TensorRT engine, and how they are written."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bmgraph.prompting.task_files import ENGINE_TOKENIZER_FILE, task_writers
from bmgraph.runtime.generation.tokenizer import FastTokenizer
from bmgraph.runtime.manifest import describe
from bmgraph.runtime.ort.bundle import tokenizer_entries, write_text
from bmgraph.serialize.bundle import Writer, write_bundle
from bmgraph.serialize.safetensors_io import write_tensors

if TYPE_CHECKING:
    from bmgraph.runtime.tensorrt.engine import TensorRTEngine

PLAN_FILE, EXAMPLE_FILE = "model.plan", "example.safetensors"


def save_engine(engine: TensorRTEngine, path: Path) -> None:
    """Write an engine as a bundle; raises BundleError if it cannot be written, and then leaves nothing behind."""
    manifest: dict[str, object] = {
        **describe(engine),
        "hardware": engine.hardware.as_json(),
        "layers": engine.layers,
        "room": engine.room,
    }
    if engine.refits is not None:
        manifest["refit"] = engine.refits.as_json()
    if engine.decoder() is not None:
        manifest["generation"] = engine.generation.as_json()
    writers: dict[str, Writer] = {
        PLAN_FILE: lambda file: _copy(engine, file),
        EXAMPLE_FILE: lambda file: write_tensors(file, engine.example),
    }
    text: str | None = None
    if isinstance(engine.tokenizer, FastTokenizer):
        entries, text = tokenizer_entries(engine.tokenizer)
        manifest |= entries
        writers[ENGINE_TOKENIZER_FILE] = partial(write_text, text)
    if engine.task is not None:
        writers |= task_writers(engine.task, text)
    write_bundle(path, "engine", manifest, writers)


def _copy(engine: TensorRTEngine, file: Path) -> None:
    engine.plan.copy_to(file)
    engine.plan.check_unwritten()
