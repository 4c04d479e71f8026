"""The ONNX models of a bundle: which there are, and each checked before a library reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bmgraph.errors import BundleError
from bmgraph.ir.tensor_spec import graph_output_names
from bmgraph.runtime.manifest import Description, read_description
from bmgraph.runtime.ort.bundle import GRAPHS, MODEL_FILE, TABLES, graph_file
from bmgraph.runtime.ort.model_allowlist import admit
from bmgraph.runtime.ort.model_files import ModelFiles
from bmgraph.runtime.ort.session import ModelInMemory
from bmgraph.serialize.bundle import Bundle
from bmgraph.serialize.early_files import early_encoder
from bmgraph.serialize.program_json import MOST_GRAPHS
from bmgraph.serialize.signature_json import is_name


def other_graphs(bundle: Bundle) -> dict[str, tuple[str, dict[str, Any]]]:
    """For each other graph its model's file, and the manifest's entries on it, which replace those on the main graph.

    Raises BundleError where the manifest and the files do not name the same models.
    """
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


def admitted(
    bundle: Bundle, manifest: Mapping[str, Any], files: ModelFiles, contrib: bool = True
) -> tuple[Description, ModelInMemory]:
    """What a manifest says of a model, and the model in memory, checked against it: what is run is what was admitted. Weights of
    files that are mapped are not read.

    `contrib`: operators of ONNX Runtime's own domain are allowed. Raises BundleError.
    """
    found = read_description(bundle.path, manifest, files.bytes)
    model = files.read(weights=not files.are_mapped)
    names = admit(bundle.path / files.model, model.data, files.held, contrib)
    inputs = [*(spec.name for spec in found.inputs), *names_of_tables(bundle, manifest)]
    if found.cache is not None and found.cache.ends is not None:
        inputs.append(found.cache.ends)
    expected = inputs, graph_output_names(found.inputs, found.outputs)
    if names != expected:
        raise BundleError(f"the model of {bundle.path} does not have the inputs and outputs of its manifest")
    return found, model


def names_of_tables(bundle: Bundle, manifest: Mapping[str, Any]) -> dict[str, str]:
    """The inputs of a model that are tables, with the names of these; raises BundleError for other data."""
    found = manifest.get(TABLES, {})
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise BundleError(f"the manifest of {bundle.path} does not say which inputs are tables of deltas")
    return found
