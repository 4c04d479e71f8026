"""The files of a saved OpenVINO engine, and how they are written: the ONNX models, and nothing that was compiled of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmgraph.runtime.ort.bundle import GRAPHS, engine_files
from bmgraph.serialize.bundle import write_bundle

if TYPE_CHECKING:
    from bmgraph.runtime.openvino.engine import OpenVinoEngine

SETTINGS = "openvino"
"""Key of what the manifest says of the library's version, and of how the engine computes."""

ROUNDED_BLOCKS = "rounded_blocks"
"""Key of what the manifest says, for each graph, of the blocks that products of codes round."""


def save_engine(engine: OpenVinoEngine, path: Path) -> None:
    """Write an engine as a bundle; raises BundleError if it cannot be written, and then leaves nothing behind."""
    settings, (manifest, writers) = engine.settings, engine_files(engine)
    manifest[SETTINGS] = {
        "version": engine.version, "precision": settings.precision, "shapes": settings.shapes,
        "kv_cache": settings.kv_cache,
    }  # fmt: skip
    manifest[ROUNDED_BLOCKS] = settings.rounded_blocks
    graphs: Any = manifest.get(GRAPHS, {})
    for name, part in engine.graphs.items():
        graphs[name][ROUNDED_BLOCKS] = part.settings.rounded_blocks
    write_bundle(path, "engine", manifest, writers)
