"""Load an ONNX Runtime engine from a bundle, after checking its models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bmgraph.deltas.peft_format import COMPUTATION
from bmgraph.deltas.row_tables import RowTables
from bmgraph.errors import BundleError
from bmgraph.ir.computation import Computation
from bmgraph.ir.generation_defaults import GenerationDefaults
from bmgraph.prompting.task_files import ENGINE_TOKENIZER_FILE, read_task
from bmgraph.runtime.generation.chat_template import ChatTemplate
from bmgraph.runtime.generation.tokenizer import FastTokenizer
from bmgraph.runtime.ort.bundle import CHAT, DELTAS, DELTAS_FILE, EXAMPLE_FILE, MODEL_FILE, TABLES
from bmgraph.runtime.ort.bundled_models import admitted, names_of_tables, other_graphs
from bmgraph.runtime.ort.engine import OrtEngine, OwnedTables
from bmgraph.runtime.ort.model_files import ModelFiles
from bmgraph.serialize.bundle import Bundle, strict_json
from bmgraph.serialize.safetensors_io import read_tensors
from bmgraph.utils.huge_pages import use_huge_pages


def load_engine(
    bundle: Bundle,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    huge_pages: bool = False,
) -> OrtEngine:
    """The engine in a checked bundle; `providers` and `threads` are those of `make_session`, `huge_pages` that of `Onnx`.

    Every model passes the allowlist before ONNX Runtime reads it. Raises BundleError if a model, the manifest or the
    tokenizer is refused.
    """
    for name in (MODEL_FILE, EXAMPLE_FILE):
        bundle.open(name)
    graphs: dict[str, OrtEngine] = {}
    owned = _owned(bundle)
    for name, (file, entries) in other_graphs(bundle).items():
        files = ModelFiles(bundle.path, file, bundle.opened, checked=True)
        described = {**bundle.manifest, TABLES: {}, **entries}
        found, model = admitted(bundle, described, files)
        graphs[name] = OrtEngine(
            files, found.inputs, found.outputs, found.ranges, found.report, providers=providers, threads=threads,
            model=model, ignored=found.ignored, cache=found.cache, graphs=graphs, tables=_tables(bundle, described, owned),
            owned=owned,
        )  # fmt: skip
    example, tokenizer = read_tensors(bundle.open(EXAMPLE_FILE)), _tokenizer(bundle)
    task = read_task(bundle)
    files = ModelFiles(bundle.path, MODEL_FILE, bundle.opened, checked=True)
    found, model = admitted(bundle, bundle.manifest, files)
    engine = OrtEngine(
        files, found.inputs, found.outputs, found.ranges, found.report, example=example, providers=providers,
        threads=threads, tokenizer=tokenizer, graphs=graphs, model=model, ignored=found.ignored, cache=found.cache,
        generation=_generation(bundle), tables=_tables(bundle, bundle.manifest, owned), owned=owned,
    )  # fmt: skip
    if owned is not None:
        _check_choice(bundle, engine, owned)
        engine.serve_deltas(owned)
        engine.deltas.changed = bool(bundle.manifest[DELTAS].get("changed"))
    engine.task = task
    if huge_pages:
        use_huge_pages()
    return engine


def _owned(bundle: Bundle) -> OwnedTables | None:
    """The tables of deltas of a bundle; None without any. Raises BundleError where they do not fit what the manifest says."""
    data = bundle.manifest.get(DELTAS)
    if data is None:
        return None
    if not isinstance(data, dict):
        raise BundleError(f"the manifest of {bundle.path} does not describe the engine's deltas")
    form = RowTables.from_json(data, Computation.from_json(strict_json(bundle.open(COMPUTATION))))
    tensors = read_tensors(bundle.open(DELTAS_FILE))
    count = len(form.names) + 1
    if set(tensors) != {item.name for item in form.tables} or not all(
        tensor.dim()
        and len(tensor) == count
        and tensor.dtype in (torch.float32, torch.float16, torch.float64)
        for tensor in tensors.values()
    ):
        raise BundleError(f"the tables of deltas of {bundle.path} are not those that its manifest describes")
    return OwnedTables(form, tensors)


def _tables(bundle: Bundle, manifest: Mapping[str, Any], owned: OwnedTables | None) -> dict[str, str]:
    """The inputs of a model that are tables; raises BundleError where a table is missing."""
    found = names_of_tables(bundle, manifest)
    if not set(found.values()) <= set(owned.tensors if owned is not None else ()):
        raise BundleError(f"the model of {bundle.path} reads tables of deltas that the bundle does not hold")
    return found


def _check_choice(bundle: Bundle, engine: OrtEngine, owned: OwnedTables) -> None:
    """Raise BundleError unless the input that chooses among deltas is there, with a name for each entry."""
    spec = next((spec for spec in engine.inputs if spec.name == owned.form.input), None)
    if spec is None or spec.dtype != torch.int64 or len(spec.shape) != 1:
        raise BundleError(
            f"the manifest of {bundle.path} has no input {owned.form.input!r} that chooses among its deltas"
        )


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
    found = bundle.manifest.get(CHAT)
    try:
        chat = None if found is None else ChatTemplate.from_json(found)
    except ValueError as error:
        raise BundleError(f"the manifest of {bundle.path} is not valid: {error}") from error
    return FastTokenizer(bundle.text(ENGINE_TOKENIZER_FILE), tuple(eos_ids), chat)
