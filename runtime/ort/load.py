"""Load an ONNX Runtime engine from a bundle, after checking its models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bmgraph.errors import BundleError
from bmgraph.ir.generation_defaults import GenerationDefaults
from bmgraph.ir.tensor_spec import graph_output_names
from bmgraph.runtime.generation.tokenizer import FastTokenizer
from bmgraph.runtime.manifest import Description, read_description
from bmgraph.runtime.ort.bundle import ENCODER_FILE, EXAMPLE_FILE, MODEL_FILE, TOKENIZER_FILE, weights_file
from bmgraph.runtime.ort.engine import Engine
from bmgraph.runtime.ort.model_allowlist import admit
from bmgraph.serialize.bundle import Bundle
from bmgraph.serialize.safetensors_io import read_tensors


def load_engine(bundle: Bundle, providers: Sequence[str] | None = None, threads: int | None = None) -> Engine:
    """The engine in a checked bundle; `providers` and `threads` are those of `make_session`.

    Every model passes the allowlist before ONNX Runtime reads it. Raises BundleError if a model, the manifest or the
    tokenizer is refused.
    """
    encoder = None
    if ENCODER_FILE in bundle.manifest["files"]:
        manifest = {**bundle.manifest, **_encoder_manifest(bundle)}
        found = _checked_description(replace(bundle, manifest=manifest), ENCODER_FILE)
        encoder = Engine(
            bundle.path, found.inputs, found.outputs, found.ranges, found.report, providers=providers, threads=threads,
            file=ENCODER_FILE, ignored=found.ignored,
        )  # fmt: skip
    found = _checked_description(bundle, MODEL_FILE)
    return Engine(
        bundle.path, found.inputs, found.outputs, found.ranges, found.report,
        example=read_tensors(bundle.open(EXAMPLE_FILE)), providers=providers, threads=threads,
        tokenizer=_tokenizer(bundle), encoder=encoder, ignored=found.ignored,
        generation=_generation(bundle),
    )  # fmt: skip


def _encoder_manifest(bundle: Bundle) -> dict[str, Any]:
    """The manifest's entries on the encoder, which replace those on the decoder."""
    entries = bundle.manifest.get("encoder")
    if not isinstance(entries, dict) or "files" in entries:
        raise BundleError(f"the manifest of {bundle.path} does not describe the encoder")
    return entries


def _checked_description(bundle: Bundle, model: str) -> Description:
    """What the manifest says of a model, checked against the model file."""
    weights = weights_file(model)
    found = read_description(bundle, (model, weights))
    names = admit(bundle.file(model), bundle.path, weights if weights in bundle.manifest["files"] else None)
    expected = [spec.name for spec in found.inputs], graph_output_names(found.inputs, found.outputs)
    if names != expected:
        raise BundleError(f"the model of {bundle.path} does not have the inputs and outputs of its manifest")
    return found


def _generation(bundle: Bundle) -> GenerationDefaults:
    """What the model's generation config said; nothing in a bundle that holds no word of it."""
    try:
        return GenerationDefaults.from_json(bundle.manifest.get("generation", {}))
    except ValueError as error:
        raise BundleError(f"the manifest of {bundle.path} does not describe an engine: {error}") from error


def _tokenizer(bundle: Bundle) -> FastTokenizer | None:
    """The tokenizer of a bundle; None if it holds none."""
    if TOKENIZER_FILE not in bundle.manifest["files"]:
        return None
    eos_ids = bundle.manifest.get("ends")
    if not isinstance(eos_ids, list) or not all(isinstance(item, int) and item >= 0 for item in eos_ids):
        raise BundleError(f"the manifest of {bundle.path} does not say which ids end a text")
    return FastTokenizer(bundle.file(TOKENIZER_FILE).read_text(encoding="utf-8"), tuple(eos_ids))
