"""Load a TensorRT engine from a bundle, if its library and hardware are those of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bmgraph.errors import BackendError, BundleError
from bmgraph.prompting.task_files import read_task
from bmgraph.runtime.manifest import read_description
from bmgraph.runtime.ort.bundled_parts import generation_of, tokenizer_of
from bmgraph.runtime.tensorrt.bundle import EXAMPLE_FILE, PLAN_FILE
from bmgraph.runtime.tensorrt.engine import TensorRTEngine
from bmgraph.runtime.tensorrt.hardware import Hardware, misfit
from bmgraph.runtime.tensorrt.library import LIBRARIES
from bmgraph.runtime.tensorrt.refit import RefitForm
from bmgraph.serialize.bundle import Bundle
from bmgraph.serialize.safetensors_io import read_tensors


def load_engine(bundle: Bundle, cache: str | Path | None = None, trust: bool = False) -> TensorRTEngine:
    """The engine in a bundle whose checksums were checked; `cache` is that of `TensorRT`.

    A plan is native code, which no check of ours can hold back: it is loaded only with `trust` in its maker. Raises
    BundleError without it and if the manifest is not valid, BackendError if this machine is not what the engine was built
    for.
    """
    if not trust:
        raise BundleError(
            f"{bundle.path} holds a TensorRT plan, which is native code and runs with your rights: load it only if you trust "
            "who made it, by bg.load(path, trust=True) or --trust tensorrt, or compile the model here"
        )
    plan = bundle.open(PLAN_FILE)
    found = read_description(bundle.path, bundle.manifest, plan.status.st_size)
    manifest: Any = bundle.manifest
    try:
        hardware = Hardware.from_json(manifest["hardware"])
        layers = {str(kind): int(count) for kind, count in manifest["layers"].items()}
        room = int(manifest.get("room", 0))
        refits = RefitForm.from_json(manifest["refit"]) if "refit" in manifest else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"the manifest of {bundle.path} does not say its hardware: {error}") from error
    if hardware.library not in LIBRARIES:
        raise BundleError(
            f"{bundle.path} names the library {hardware.library!r}: expected {' or '.join(LIBRARIES)}"
        )
    reason = misfit(hardware)
    if reason:
        raise BackendError(f"cannot load {bundle.path}: {reason}")
    engine = TensorRTEngine(
        plan, found.inputs, found.outputs, found.ranges, found.report, hardware, layers,
        example=read_tensors(bundle.open(EXAMPLE_FILE)), ignored=found.ignored, cache=found.cache,
        room=room if found.cache is not None and room > 0 else 0, tokenizer=tokenizer_of(bundle), generation=generation_of(bundle),
        refits=refits, kernels=cache,
    )  # fmt: skip
    engine.task = read_task(bundle)
    return engine
