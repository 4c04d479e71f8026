"""The files of a saved ONNX Runtime engine, and how they are written."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bmgraph.runtime.generation.tokenizer import FastTokenizer
from bmgraph.runtime.manifest import describe
from bmgraph.serialize.bundle import Writer, write_bundle
from bmgraph.serialize.safetensors_io import write_tensors

if TYPE_CHECKING:
    from bmgraph.runtime.ort.engine import OrtEngine

MODEL_FILE, ENCODER_FILE = "model.onnx", "encoder.onnx"
EXAMPLE_FILE, TOKENIZER_FILE = "example.safetensors", "tokenizer.json"


def save_engine(engine: OrtEngine, path: Path) -> None:
    """Write an engine as a bundle; raises BundleError if it cannot be written, and then leaves nothing behind.

    A tokenizer of the `tokenizers` library (one JSON file) is saved too; other tokenizer objects are not.
    """
    writers: dict[str, Writer] = {}
    for files in (engine.encoder.files, engine.files) if engine.encoder else (engine.files,):
        for name in files.opened:
            writers[name] = partial(files.copy, name)
    manifest = describe(engine)
    if engine.encoder is not None:
        manifest["encoder"] = describe(engine.encoder)
    if engine.decoder() is not None:
        manifest["generation"] = engine.generation.as_json()
    if isinstance(engine.tokenizer, FastTokenizer):
        text, manifest["ends"] = engine.tokenizer.text, list(engine.tokenizer.eos_ids)
        writers[TOKENIZER_FILE] = partial(_write_text, text)
    writers[EXAMPLE_FILE] = lambda file: write_tensors(file, engine.example)
    write_bundle(path, "engine", manifest, writers)


def _write_text(text: str, file: Path) -> None:
    file.write_text(text, encoding="utf-8")
