"""Engines as bundles."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmgraph.bundle import Bundle, write_bundle
from bmgraph.errors import BundleError
from bmgraph.history import Record
from bmgraph.program_json import decode_ranges, decode_spec, encode_ranges, encode_spec
from bmgraph.report import Report
from bmgraph.tensors import write_tensors

if TYPE_CHECKING:
    from bmgraph.runtime.engine import Engine

MODEL, DATA, EXAMPLE = "model.onnx", "model.onnx.data", "example.safetensors"


def save_engine(engine: Engine, path: Path) -> None:
    """Write an engine as a bundle; raises BundleError where it cannot be written, and then leaves nothing."""
    report = engine.report
    manifest = {
        "backend": report.backend,
        "passes": [record.text for record in report.records if not record.within],
        "history": [record.as_json() for record in report.records],
        "inputs": [encode_spec(spec) for spec in engine.inputs],
        "outputs": [encode_spec(spec) for spec in engine.outputs],
        "ranges": encode_ranges(engine.ranges),
        "weights": report.weights,
        "drift": {"engine": report.engine_drift, "total": report.total_drift, "cosine": report.total_cosine},
    }
    writers = {MODEL: lambda file: _copy(engine.folder / MODEL, file)}
    if (engine.folder / DATA).exists():
        writers[DATA] = lambda file: _copy(engine.folder / DATA, file)
    writers[EXAMPLE] = lambda file: write_tensors(file, engine.example)
    write_bundle(path, "engine", manifest, writers)


def _copy(source: Path, file: Path) -> None:
    shutil.copyfile(source, file)


def load_engine(bundle: Bundle, providers: Sequence[str] | None = None, threads: int | None = None) -> Engine:
    """The engine of a checked bundle, whose model is admitted before ONNX Runtime sees it."""
    from bmgraph.runtime.admit import admit
    from bmgraph.runtime.engine import Engine
    from bmgraph.tensors import read_tensors

    manifest: Any = bundle.manifest
    try:
        inputs = tuple(decode_spec(item) for item in manifest["inputs"])
        outputs = tuple(decode_spec(item) for item in manifest["outputs"])
        ranges = decode_ranges(manifest["ranges"])
        records = tuple(Record.from_json(item) for item in manifest["history"])
        drift = manifest["drift"]
        report = Report(
            records=records, backend=str(manifest["backend"]), engine_drift=_number(drift["engine"]),
            total_drift=_number(drift["total"]), total_cosine=_number(drift["cosine"]), weights=str(manifest["weights"]),
            bytes=sum(os.path.getsize(bundle.file(name)) for name in (MODEL, DATA) if name in manifest["files"]),
        )  # fmt: skip
    except BundleError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"the manifest of {bundle.path} describes no engine: {error}") from error
    names = admit(bundle.file(MODEL), bundle.path, DATA if DATA in manifest["files"] else None)
    if names != ([spec.name for spec in inputs], [spec.name for spec in outputs]):
        raise BundleError(f"the model of {bundle.path} does not have the inputs and outputs of its manifest")
    example = read_tensors(bundle.file(EXAMPLE))
    return Engine(
        bundle.path, inputs, outputs, ranges, report, example=example, providers=providers, threads=threads
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
