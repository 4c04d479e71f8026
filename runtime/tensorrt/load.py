"""Load a TensorRT engine from a bundle, if its library and hardware are those of this machine."""

from __future__ import annotations

from typing import Any

from bmgraph.errors import BackendError, BundleError
from bmgraph.runtime.manifest import read_description
from bmgraph.runtime.tensorrt.bundle import EXAMPLE_FILE, PLAN_FILE
from bmgraph.runtime.tensorrt.engine import TensorRTEngine
from bmgraph.runtime.tensorrt.hardware import Hardware, misfit
from bmgraph.runtime.tensorrt.library import LIBRARIES
from bmgraph.serialize.bundle import Bundle
from bmgraph.serialize.safetensors_io import read_tensors


def load_engine(bundle: Bundle) -> TensorRTEngine:
    """The engine in a bundle whose checksums were checked.

    Raises BundleError if the manifest is not valid, BackendError if this machine is not what the engine was built for.
    """
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
        example=read_tensors(bundle.open(EXAMPLE_FILE)), ignored=found.ignored,
    )  # fmt: skip
