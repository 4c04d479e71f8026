"""Manifest entries that every saved engine has: signature, history of passes, drift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmgraph.errors import BundleError
from bmgraph.ir.cache_spec import CacheLayout
from bmgraph.ir.pass_record import Record
from bmgraph.ir.tensor_spec import Range, TensorSpec
from bmgraph.pass_manager.report import Report
from bmgraph.runtime.engine_base import Engine
from bmgraph.serialize.cache_json import decode_cache, encode_cache
from bmgraph.serialize.early_files import kinds_of_names
from bmgraph.serialize.signature_json import decode_ranges, decode_spec, encode_ranges, encode_spec


@dataclass(frozen=True)
class Description:
    """The entries of `describe`, decoded."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    ranges: dict[str, Range]
    report: Report
    ignored: tuple[str, ...]
    cache: CacheLayout | None


def describe(engine: Engine) -> dict[str, object]:
    """The signature, history and drift of an engine, as entries of its manifest."""
    report = engine.report
    return {
        "backend": report.backend,
        "passes": [record.text for record in report.records if not record.within],
        "history": [record.as_json() for record in report.records],
        "inputs": [encode_spec(spec) for spec in engine.inputs],
        "outputs": [encode_spec(spec) for spec in engine.outputs],
        "ranges": encode_ranges(engine.ranges),
        "ignored": list(engine.ignored),
        "cache": encode_cache(engine.cache),
        "weights": report.weights,
        "drift": {"engine": report.engine_drift, "total": report.total_drift, "cosine": report.total_cosine},
    }


def read_description(where: Path, manifest: Mapping[str, Any], size: int) -> Description:
    """Decode the entries that `describe` wrote in the bundle `where`; raises BundleError if one is missing or not valid.

    `size` is that of the engine's files, for `report.bytes`.
    """
    try:
        drift = manifest["drift"]
        report = Report(
            records=tuple(Record.from_json(item) for item in manifest["history"]),
            backend=str(manifest["backend"]), engine_drift=_number(drift["engine"]),
            total_drift=_number(drift["total"]), total_cosine=_number(drift["cosine"]), weights=str(manifest["weights"]),
            bytes=size,
        )  # fmt: skip
        inputs = kinds_of_names(tuple(decode_spec(item) for item in manifest["inputs"]))
        outputs = tuple(decode_spec(item) for item in manifest["outputs"])
        return Description(
            inputs,
            outputs,
            decode_ranges(manifest["ranges"]),
            report,
            tuple(map(str, manifest.get("ignored", []))),
            decode_cache(manifest, inputs, outputs),
        )
    except BundleError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise BundleError(f"the manifest of {where} does not describe an engine: {error}") from error


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
