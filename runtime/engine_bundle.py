"""Engines as bundles."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bmgraph.bundle import Bundle, write_bundle
from bmgraph.errors import BundleError
from bmgraph.runtime.engine_manifest import describe, read_description
from bmgraph.tensors import read_tensors, write_tensors

if TYPE_CHECKING:
    from bmgraph.runtime.engine import Engine

MODEL, DATA, EXAMPLE = "model.onnx", "model.onnx.data", "example.safetensors"


def save_engine(engine: Engine, path: Path) -> None:
    """Write an engine as a bundle; raises BundleError where it cannot be written, and then leaves nothing."""
    writers = {MODEL: lambda file: _copy(engine.folder / MODEL, file)}
    if (engine.folder / DATA).exists():
        writers[DATA] = lambda file: _copy(engine.folder / DATA, file)
    writers[EXAMPLE] = lambda file: write_tensors(file, engine.example)
    write_bundle(path, "engine", describe(engine), writers)


def _copy(source: Path, file: Path) -> None:
    shutil.copyfile(source, file)


def load_engine(bundle: Bundle, providers: Sequence[str] | None = None, threads: int | None = None) -> Engine:
    """The engine of a checked bundle, whose model is admitted before ONNX Runtime sees it."""
    from bmgraph.runtime.admit import admit
    from bmgraph.runtime.engine import Engine

    found = read_description(bundle, (MODEL, DATA))
    names = admit(bundle.file(MODEL), bundle.path, DATA if DATA in bundle.manifest["files"] else None)
    if names != ([spec.name for spec in found.inputs], [spec.name for spec in found.outputs]):
        raise BundleError(f"the model of {bundle.path} does not have the inputs and outputs of its manifest")
    return Engine(
        bundle.path, found.inputs, found.outputs, found.ranges, found.report,
        example=read_tensors(bundle.file(EXAMPLE)), providers=providers, threads=threads,
    )  # fmt: skip
