"""Load an ONNX Runtime engine from a bundle, after checking its models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bmgraph.errors import BundleError
from bmgraph.ir.generation_defaults import GenerationDefaults
from bmgraph.ir.tensor_spec import graph_output_names
from bmgraph.prompting.task_files import ENGINE_TOKENIZER_FILE, read_task
from bmgraph.runtime.generation.tokenizer import FastTokenizer
from bmgraph.runtime.manifest import Description, read_description
from bmgraph.runtime.ort.bundle import EXAMPLE_FILE, GRAPHS, MODEL_FILE, graph_file
from bmgraph.runtime.ort.engine import OrtEngine
from bmgraph.runtime.ort.model_allowlist import admit
from bmgraph.runtime.ort.model_files import ModelFiles, weights_file
from bmgraph.runtime.ort.session import ModelInMemory
from bmgraph.serialize.bundle import Bundle
from bmgraph.serialize.early_files import early_encoder
from bmgraph.serialize.program_json import MOST_GRAPHS
from bmgraph.serialize.safetensors_io import read_tensors
from bmgraph.serialize.signature_json import is_name


def load_engine(
    bundle: Bundle, providers: Sequence[str] | None = None, threads: int | None = None
) -> OrtEngine:
    """The engine in a checked bundle; `providers` and `threads` are those of `make_session`.

    Every model passes the allowlist before ONNX Runtime reads it. Raises BundleError if a model, the manifest or the
    tokenizer is refused.
    """
    for name in (MODEL_FILE, EXAMPLE_FILE):
        bundle.open(name)
    graphs: dict[str, OrtEngine] = {}
    for name, (file, entries) in _other_graphs(bundle).items():
        files = ModelFiles(bundle.path, file, bundle.opened, checked=True)
        found, model = _admitted(bundle, {**bundle.manifest, **entries}, files)
        graphs[name] = OrtEngine(
            files, found.inputs, found.outputs, found.ranges, found.report, providers=providers, threads=threads,
            model=model, ignored=found.ignored, cache=found.cache, graphs=graphs,
        )  # fmt: skip
    example, tokenizer = read_tensors(bundle.open(EXAMPLE_FILE)), _tokenizer(bundle)
    task = read_task(bundle)
    files = ModelFiles(bundle.path, MODEL_FILE, bundle.opened, checked=True)
    found, model = _admitted(bundle, bundle.manifest, files)
    engine = OrtEngine(
        files, found.inputs, found.outputs, found.ranges, found.report, example=example, providers=providers,
        threads=threads, tokenizer=tokenizer, graphs=graphs, model=model, ignored=found.ignored, cache=found.cache,
        generation=_generation(bundle),
    )  # fmt: skip
    engine.task = task
    return engine


def _other_graphs(bundle: Bundle) -> dict[str, tuple[str, dict[str, Any]]]:
    """For each other graph its model's file, and the manifest's entries on it, which replace those on the main graph."""
    given = bundle.manifest.get(GRAPHS, {})
    if not isinstance(given, dict) or len(given) > MOST_GRAPHS or not all(map(is_name, given)):
        raise BundleError(f"the manifest of {bundle.path} does not name the engine's graphs")
    found = {name: (graph_file(name), entries) for name, entries in given.items()} or early_encoder(
        bundle.manifest, bundle.opened
    )
    for name, (file, entries) in found.items():
        if not isinstance(entries, dict) or "files" in entries or file not in bundle.opened:
            raise BundleError(f"the manifest of {bundle.path} does not describe the graph {name!r}")
    known = {MODEL_FILE, *(file for file, _ in found.values())}
    for file in bundle.opened:
        if file.endswith(".onnx") and file not in known:
            raise BundleError(f"the manifest of {bundle.path} does not describe {file!r}")
    return found


def _admitted(
    bundle: Bundle, manifest: Mapping[str, Any], files: ModelFiles
) -> tuple[Description, ModelInMemory]:
    """What a manifest says of a model, and the model in memory, checked against it: what is run is what was admitted."""
    found = read_description(bundle.path, manifest, files.bytes)
    model = files.read()
    weights = weights_file(files.model)
    held = (weights, len(model.weights[weights])) if weights in model.weights else None
    names = admit(model.path, model.data, held)
    expected = [spec.name for spec in found.inputs], graph_output_names(found.inputs, found.outputs)
    if names != expected:
        raise BundleError(f"the model of {bundle.path} does not have the inputs and outputs of its manifest")
    return found, model


def _generation(bundle: Bundle) -> GenerationDefaults:
    """What the model's generation config said; nothing in a bundle that holds no word of it."""
    try:
        return GenerationDefaults.from_json(bundle.manifest.get("generation", {}))
    except ValueError as error:
        raise BundleError(f"the manifest of {bundle.path} does not describe an engine: {error}") from error


def _tokenizer(bundle: Bundle) -> FastTokenizer | None:
    """The tokenizer of a bundle; None if it holds none."""
    if ENGINE_TOKENIZER_FILE not in bundle.opened:
        return None
    eos_ids = bundle.manifest.get("ends")
    if not isinstance(eos_ids, list) or not all(type(item) is int and 0 <= item < 2**63 for item in eos_ids):
        raise BundleError(f"the manifest of {bundle.path} does not say which ids end a text")
    return FastTokenizer(bundle.text(ENGINE_TOKENIZER_FILE), tuple(eos_ids))
