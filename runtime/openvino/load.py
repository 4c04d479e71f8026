"""Load an OpenVINO engine from a bundle: its ONNX models are checked, and compiled again here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bmgraph.errors import BackendError, BundleError, InputError
from bmgraph.ir.cache_spec import FLOAT, INT8
from bmgraph.prompting.task_files import read_task
from bmgraph.runtime.openvino.bundle import ROUNDED_BLOCKS, SETTINGS
from bmgraph.runtime.openvino.compiled import DYNAMIC, STATIC, Settings
from bmgraph.runtime.openvino.engine import PRECISIONS, OpenVinoEngine
from bmgraph.runtime.openvino.library import has_bf16, library_version
from bmgraph.runtime.ort.allowed_operators import BLOCKS
from bmgraph.runtime.ort.bundle import DELTAS, EXAMPLE_FILE, MODEL_FILE, TABLES
from bmgraph.runtime.ort.bundled_models import admitted, other_graphs
from bmgraph.runtime.ort.bundled_parts import (
    check_choice,
    generation_of,
    owned_tables_of,
    tables_of,
    tokenizer_of,
)
from bmgraph.runtime.ort.model_files import ModelFiles
from bmgraph.runtime.owned_tables import OwnedTables
from bmgraph.runtime.temporary import folder_for_engine
from bmgraph.serialize.bundle import Bundle
from bmgraph.serialize.safetensors_io import read_tensors
from bmgraph.utils.locked_folder import LockedFolder


def load_engine(
    bundle: Bundle,
    threads: int | None = None,
    cache: str | None = None,
    other_version: bool = False,
) -> OpenVinoEngine:
    """The engine in a checked bundle; `threads` and `cache` are those of the configuration `OpenVINO`.

    Every model passes the allowlist, and is written to a private folder, before OpenVINO reads it; nothing that was compiled
    elsewhere is read. Raises BundleError if a model or the manifest is refused, BackendError if this machine has another
    version of OpenVINO, in which the engine was not compared with its program, unless `other_version` is given.
    """
    for name in (MODEL_FILE, EXAMPLE_FILE):
        bundle.open(name)
    settings, note = _settings(bundle, threads, cache, other_version)
    task, example = read_task(bundle), read_tensors(bundle.open(EXAMPLE_FILE))
    owned = owned_tables_of(bundle)
    with folder_for_engine() as folder:
        graphs: dict[str, OpenVinoEngine] = {}
        for name, (file, entries) in other_graphs(bundle).items():
            manifest = {**bundle.manifest, TABLES: {}, ROUNDED_BLOCKS: 0, **entries}
            graphs[name] = _engine(bundle, manifest, file, settings, folder.path, graphs=graphs, owned=owned)
        engine = _engine(
            bundle, bundle.manifest, MODEL_FILE, settings, folder.path, graphs=graphs, owned=owned, example=example,
            temporary=folder,
        )  # fmt: skip
        engine.tokenizer, engine.generation = tokenizer_of(bundle), generation_of(bundle)
        if owned is not None:
            check_choice(bundle, engine, owned)
            engine.serve_deltas(owned)
            engine.deltas.changed = bool(bundle.manifest[DELTAS].get("changed"))
        if all(spec.name in example for spec in engine.inputs):
            _prepare(bundle, engine, example)
    engine.report.notes += note
    engine.task = task
    return engine


def _engine(
    bundle: Bundle,
    manifest: Mapping[str, Any],
    file: str,
    settings: Settings,
    folder: Path,
    *,
    graphs: Mapping[str, OpenVinoEngine],
    owned: OwnedTables | None,
    example: Mapping[str, torch.Tensor] | None = None,
    temporary: LockedFolder | None = None,
) -> OpenVinoEngine:
    """The engine of one model of a bundle, from a copy of what was checked."""
    files = ModelFiles(bundle.path, file, bundle.opened, checked=True)
    found, model = admitted(bundle, manifest, files, contrib=False)
    return OpenVinoEngine(
        files.copied_to(folder, model), found.inputs, found.outputs, found.ranges, found.report,
        replace(settings, rounded_blocks=_rounded_blocks(bundle, manifest)),
        example=example, ignored=found.ignored, graphs=graphs, temporary=temporary, cache=found.cache,
        tables=tables_of(bundle, manifest, owned), owned=owned,
    )  # fmt: skip


def _rounded_blocks(bundle: Bundle, manifest: Mapping[str, Any]) -> int:
    """The size of the blocks that products of codes round; raises BundleError for none that there is."""
    found = manifest.get(ROUNDED_BLOCKS, 0)
    if type(found) is not int or found not in (0, *BLOCKS):
        raise BundleError(f"the manifest of {bundle.path} does not say which blocks products round")
    return found


def _prepare(bundle: Bundle, engine: OpenVinoEngine, example: Mapping[str, torch.Tensor]) -> None:
    """Compile for the example, so that what OpenVINO rejects is known now; raises BundleError for one that does not fit."""
    try:
        batch = engine.checked(example)
    except InputError as error:
        raise BundleError(f"the example of {bundle.path} does not fit its engine: {error}") from error
    engine.prepare(batch)


def _settings(
    bundle: Bundle, threads: int | None, cache: str | None, other_version: bool
) -> tuple[Settings, list[str]]:
    """How the engine computes, by its manifest and as far as this machine can; and what the report says of a difference."""
    said = bundle.manifest.get(SETTINGS)
    version, precision, shapes = (
        said.get(key) if isinstance(said, dict) else None for key in ("version", "precision", "shapes")
    )
    kv_cache = said.get("kv_cache", FLOAT) if isinstance(said, dict) else None
    if (
        not isinstance(version, str)
        or precision not in PRECISIONS
        or shapes not in (STATIC, DYNAMIC)
        or kv_cache not in (FLOAT, INT8)
    ):
        raise BundleError(f"the manifest of {bundle.path} does not say how OpenVINO computes")
    here, notes = library_version(), []
    if version != here:
        if not other_version:
            raise BackendError(
                f"{bundle.path} was made and compared with its program by OpenVINO {version[:30]}, and this machine has {here}: "
                "install that one, compile the model again, or take what this one computes, by bg.load(path, other_version=True)"
            )
        notes.append(f"compared with its program by OpenVINO {version[:30]}, not by this one")
    if precision == "bf16" and not has_bf16():
        precision = "f32"
        notes.append(
            "this CPU has no bf16: float32 is computed as it is, more slowly than where the engine was made"
        )
    return Settings.of(precision, threads, shapes, cache, kv_cache), notes
