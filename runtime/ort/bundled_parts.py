"""What bundles of engines hold beside models: tables of deltas, a tokenizer, what the model's generation config said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bmgraph.deltas.peft_format import COMPUTATION
from bmgraph.deltas.row_tables import RowTables
from bmgraph.errors import BundleError
from bmgraph.ir.computation import Computation
from bmgraph.ir.generation_defaults import GenerationDefaults
from bmgraph.prompting.task_files import ENGINE_TOKENIZER_FILE
from bmgraph.runtime.engine_base import Engine
from bmgraph.runtime.generation.chat_template import ChatTemplate
from bmgraph.runtime.generation.tokenizer import FastTokenizer
from bmgraph.runtime.ort.bundle import CHAT, DELTAS, DELTAS_FILE
from bmgraph.runtime.ort.bundled_models import names_of_tables
from bmgraph.runtime.owned_tables import OwnedTables
from bmgraph.serialize.bundle import Bundle, strict_json
from bmgraph.serialize.safetensors_io import read_tensors


def owned_tables_of(bundle: Bundle) -> OwnedTables | None:
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


def tables_of(bundle: Bundle, manifest: Mapping[str, Any], owned: OwnedTables | None) -> dict[str, str]:
    """The inputs of a model that are tables; raises BundleError where a table is missing."""
    found = names_of_tables(bundle, manifest)
    if not set(found.values()) <= set(owned.tensors if owned is not None else ()):
        raise BundleError(f"the model of {bundle.path} reads tables of deltas that the bundle does not hold")
    return found


def check_choice(bundle: Bundle, engine: Engine, owned: OwnedTables) -> None:
    """Raise BundleError unless the input that chooses among deltas is there, with a name for each entry."""
    spec = next((spec for spec in engine.inputs if spec.name == owned.form.input), None)
    if spec is None or spec.dtype != torch.int64 or len(spec.shape) != 1:
        raise BundleError(
            f"the manifest of {bundle.path} has no input {owned.form.input!r} that chooses among its deltas"
        )


def generation_of(bundle: Bundle) -> GenerationDefaults:
    """What the model's generation config said; nothing in a bundle that holds no word of it."""
    try:
        return GenerationDefaults.from_json(bundle.manifest.get("generation", {}))
    except ValueError as error:
        raise BundleError(f"the manifest of {bundle.path} does not describe an engine: {error}") from error


def tokenizer_of(bundle: Bundle) -> FastTokenizer | None:
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
