"""The files of a saved OpenVINO engine, and how they are written: the ONNX models, and nothing that was compiled of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bmgraph.prompting.task_files import task_writers
from bmgraph.runtime.manifest import describe
from bmgraph.runtime.ort.bundle import EXAMPLE_FILE, GRAPHS
from bmgraph.serialize.bundle import Writer, write_bundle
from bmgraph.serialize.safetensors_io import write_tensors

if TYPE_CHECKING:
    from bmgraph.runtime.openvino.engine import OpenVinoEngine

SETTINGS = "openvino"
"""Key of what the manifest says of the library's version, and of how the engine computes."""


def save_engine(engine: OpenVinoEngine, path: Path) -> None:
    """Write an engine as a bundle; raises BundleError if it cannot be written, and then leaves nothing behind."""
    settings = engine.settings
    manifest = {
        **describe(engine),
        SETTINGS: {
            "version": engine.version, "precision": settings.precision, "shapes": settings.shapes,
        },
    }  # fmt: skip
    writers: dict[str, Writer] = {}
    for part in (*engine.graphs.values(), engine):
        for name in part.files.opened:
            writers[name] = partial(part.files.copy, name)
    if engine.graphs:
        manifest[GRAPHS] = {name: describe(part) for name, part in engine.graphs.items()}
    if engine.task is not None:
        writers |= task_writers(engine.task)
    writers[EXAMPLE_FILE] = lambda file: write_tensors(file, engine.example)
    write_bundle(path, "engine", manifest, writers)
