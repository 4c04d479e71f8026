"""Engines as bundles."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bmgraph.bundle import Bundle, write_bundle
from bmgraph.errors import BundleError
from bmgraph.runtime.engine_manifest import describe, read_description
from bmgraph.runtime.tokenizer import Fast
from bmgraph.tensors import read_tensors, write_tensors

if TYPE_CHECKING:
    from bmgraph.runtime.engine import Engine

MODEL, DATA, EXAMPLE = "model.onnx", "model.onnx.data", "example.safetensors"
TOKENIZER = "tokenizer.json"


def save_engine(engine: Engine, path: Path) -> None:
    """Write an engine as a bundle; raises BundleError where it cannot be written, and then leaves nothing.

    A tokenizer goes with it where it is one file of the `tokenizers` library; the user's own objects do not.
    """
    writers = {MODEL: lambda file: _copy(engine.folder / MODEL, file)}
    if (engine.folder / DATA).exists():
        writers[DATA] = lambda file: _copy(engine.folder / DATA, file)
    manifest = describe(engine)
    if isinstance(engine.tokenizer, Fast):
        text, manifest["ends"] = engine.tokenizer.text, list(engine.tokenizer.ends)
        writers[TOKENIZER] = lambda file: _write_text(file, text)
    writers[EXAMPLE] = lambda file: write_tensors(file, engine.example)
    write_bundle(path, "engine", manifest, writers)


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


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
        tokenizer=_tokenizer(bundle),
    )  # fmt: skip


def _tokenizer(bundle: Bundle) -> Fast | None:
    """The tokenizer of a bundle that has one."""
    if TOKENIZER not in bundle.manifest["files"]:
        return None
    ends = bundle.manifest.get("ends")
    if not isinstance(ends, list) or not all(isinstance(item, int) and item >= 0 for item in ends):
        raise BundleError(f"the manifest of {bundle.path} does not say which ids end a text")
    return Fast(bundle.file(TOKENIZER).read_text(encoding="utf-8"), tuple(ends))
