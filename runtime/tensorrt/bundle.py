"""TensorRT engines as bundles: a plan is loaded only where its checksum, library and hardware are the recorded ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from bmgraph.errors import BackendError, BundleError
from bmgraph.runtime.manifest import describe, read_description
from bmgraph.runtime.tensorrt.engine import PLAN_FILE, TensorRTEngine
from bmgraph.runtime.tensorrt.hardware import Hardware, misfit
from bmgraph.runtime.tensorrt.library import LIBRARIES
from bmgraph.serialize.bundle import Bundle, write_bundle
from bmgraph.serialize.safetensors_io import read_tensors, write_tensors

EXAMPLE = "example.safetensors"


def save_engine(engine: TensorRTEngine, path: Path) -> None:
    """Write an engine as a bundle; raises BundleError where it cannot be written, and then leaves nothing."""
    manifest = {**describe(engine), "hardware": engine.hardware.as_json(), "layers": engine.layers}
    writers = {
        PLAN_FILE: lambda file: _copy(engine.folder / PLAN_FILE, file),
        EXAMPLE: lambda file: write_tensors(file, engine.example),
    }
    write_bundle(path, "engine", manifest, writers)


def _copy(source: Path, file: Path) -> None:
    shutil.copyfile(source, file)


def load_engine(bundle: Bundle) -> TensorRTEngine:
    """The engine of a checked bundle; raises BackendError on other hardware than it was built for."""
    found = read_description(bundle, (PLAN_FILE,))
    manifest: Any = bundle.manifest
    try:
        hardware = Hardware.from_json(manifest["hardware"])
        layers = {str(kind): int(count) for kind, count in manifest["layers"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"the manifest of {bundle.path} does not say its hardware: {error}") from error
    if hardware.library not in LIBRARIES:
        raise BundleError(
            f"{bundle.path} names the library {hardware.library!r}: expected {' or '.join(LIBRARIES)}"
        )
    reason = misfit(hardware)
    if reason:
        raise BackendError(f"cannot load {bundle.path}: {reason}")
    return TensorRTEngine(
        bundle.path, found.inputs, found.outputs, found.ranges, found.report, hardware, layers,
        example=read_tensors(bundle.file(EXAMPLE)),
    )  # fmt: skip
