"""Engines as bundles."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmgraph.errors import BundleError
from bmgraph.runtime.generation.tokenizer import Fast
from bmgraph.runtime.manifest import Description, describe, read_description
from bmgraph.serialize.bundle import Bundle, write_bundle
from bmgraph.serialize.safetensors_io import read_tensors, write_tensors

if TYPE_CHECKING:
    from bmgraph.runtime.ort.engine import Engine

MODEL, ENCODER = "model.onnx", "encoder.onnx"
EXAMPLE, TOKENIZER = "example.safetensors", "tokenizer.json"


def save_engine(engine: Engine, path: Path) -> None:
    """Write an engine as a bundle; raises BundleError where it cannot be written, and then leaves nothing.

    A tokenizer goes with it where it is one file of the `tokenizers` library; the user's own objects do not.
    """
    writers: dict[str, Callable[[Path], None]] = {}
    for name in _files(ENCODER if engine.encoder else "", MODEL):
        if (engine.folder / name).exists():
            writers[name] = partial(_copy, engine.folder / name)
    manifest = describe(engine)
    if engine.encoder is not None:
        manifest["encoder"] = describe(engine.encoder)
    if isinstance(engine.tokenizer, Fast):
        text, manifest["ends"] = engine.tokenizer.text, list(engine.tokenizer.ends)
        writers[TOKENIZER] = partial(_write_text, text)
    writers[EXAMPLE] = lambda file: write_tensors(file, engine.example)
    write_bundle(path, "engine", manifest, writers)


def _files(*models: str) -> list[str]:
    """Models, each with the file of its weights."""
    return [name for model in models if model for name in (model, f"{model}.data")]


def _write_text(text: str, file: Path) -> None:
    file.write_text(text, encoding="utf-8")


def _copy(source: Path, file: Path) -> None:
    shutil.copyfile(source, file)


def load_engine(bundle: Bundle, providers: Sequence[str] | None = None, threads: int | None = None) -> Engine:
    """The engine of a checked bundle, whose models are admitted before ONNX Runtime sees them."""
    from bmgraph.runtime.ort.engine import Engine

    encoder = None
    if ENCODER in bundle.manifest["files"]:
        part = _described(replace(bundle, manifest={**bundle.manifest, **_part(bundle)}), ENCODER)
        encoder = Engine(
            bundle.path, part.inputs, part.outputs, part.ranges, part.report, providers=providers, threads=threads,
            file=ENCODER,
        )  # fmt: skip
    found = _described(bundle, MODEL)
    return Engine(
        bundle.path, found.inputs, found.outputs, found.ranges, found.report,
        example=read_tensors(bundle.file(EXAMPLE)), providers=providers, threads=threads,
        tokenizer=_tokenizer(bundle), encoder=encoder,
    )  # fmt: skip


def _part(bundle: Bundle) -> dict[str, Any]:
    """What the manifest says of the encoder."""
    part = bundle.manifest.get("encoder")
    if not isinstance(part, dict) or "files" in part:
        raise BundleError(f"the manifest of {bundle.path} describes no encoder")
    return part


def _described(bundle: Bundle, model: str) -> Description:
    """What a manifest says of a model, which must be so."""
    from bmgraph.runtime.ort.model_allowlist import admit

    model_file, data = _files(model)
    found = read_description(bundle, (model_file, data))
    names = admit(bundle.file(model), bundle.path, data if data in bundle.manifest["files"] else None)
    if names != ([spec.name for spec in found.inputs], [spec.name for spec in found.outputs]):
        raise BundleError(f"the model of {bundle.path} does not have the inputs and outputs of its manifest")
    return found


def _tokenizer(bundle: Bundle) -> Fast | None:
    """The tokenizer of a bundle that has one."""
    if TOKENIZER not in bundle.manifest["files"]:
        return None
    ends = bundle.manifest.get("ends")
    if not isinstance(ends, list) or not all(isinstance(item, int) and item >= 0 for item in ends):
        raise BundleError(f"the manifest of {bundle.path} does not say which ids end a text")
    return Fast(bundle.file(TOKENIZER).read_text(encoding="utf-8"), tuple(ends))
