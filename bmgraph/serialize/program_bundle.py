"""Saves a program, with its weights and examples, as a bundle and loads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from bmgraph.errors import BundleError, InputError
from bmgraph.ir.shared_weights import check_unchanged
from bmgraph.serialize.bundle import Bundle, strict_json, write_bundle
from bmgraph.serialize.early_files import with_encoder_as_graph
from bmgraph.serialize.outside_operators import trusted_operators
from bmgraph.serialize.program_json import decode, encode, encode_examples
from bmgraph.serialize.references import REFERENCES, describe, open_references, referred_tensors
from bmgraph.serialize.safetensors_io import read_tensors, write_tensors
from bmgraph.serialize.stored_file import scanned_tensors
from bmgraph.utils.digest import weights_digest
from bmgraph.utils.stored_tensor import in_memory

if TYPE_CHECKING:
    from bmgraph.ir.program import Program

Weights = Literal["copy", "reference"]
"""copy: the bundle holds all tensors; reference: it names the files that hold those which no pass changed."""

GRAPH, WEIGHTS, EXAMPLE = "program.json", "weights.safetensors", "example.safetensors"


def save_program(program: Program, path: str | Path, weights: Weights = "copy") -> None:
    """Write a program as a bundle, a tensor at a time.

    With weights="reference", parameters that are those of a file are not written again: the bundle names the file and the
    digest of each. Raises BundleError if it cannot be written, and then leaves no files behind; InputError where the model's
    weights were changed after the program was captured, for another value of `weights`, and where no tensor comes from a
    file.
    """
    if weights not in ("copy", "reference"):
        raise InputError(f"weights={weights!r}: choose 'copy' or 'reference'")
    check_unchanged(program.parameters, program.shared)
    tree, tensors, example = encode(program), program.tensors(), encode_examples(program)
    data = json.dumps(tree, allow_nan=False)
    referred = referred_tensors(tensors, Path(path)) if weights == "reference" else {}
    written = {name: tensor for name, tensor in tensors.items() if name not in referred}
    digests = {name: source.digest for name, source in referred.items()}

    def manifest() -> dict[str, Any]:
        return {
            "passes": [record.text for record in program.history if not record.within],
            "weights": weights_digest(tensors, digests),
            **({REFERENCES: describe(referred)} if referred else {}),
        }

    write_bundle(
        Path(path),
        "program",
        manifest,
        {
            GRAPH: lambda file: _write_text(file, data),
            WEIGHTS: lambda file: digests.update(write_tensors(file, written)),
            EXAMPLE: lambda file: write_tensors(file, example),
        },
    )


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def load_program(bundle: Bundle, trusted: tuple[str, ...] = ()) -> Program:
    """The program of a bundle from `read_bundle`; raises BundleError if it is not a valid program.

    Large parameters stay in the file that was opened, or in those that the bundle refers to, and are read when asked. It
    may call operators of the `trusted` packages, which are imported then.
    """
    tree = strict_json(bundle.open(GRAPH))
    if not isinstance(tree, dict):
        raise BundleError(
            f"{GRAPH!r} in bundle {bundle.path} does not hold a program: it is not a JSON object"
        )
    tree = with_encoder_as_graph(tree)
    tensors, example = _tensors(bundle, tree), read_tensors(bundle.open(EXAMPLE))
    return decode(tree, tensors, example, trusted_operators([tree], trusted))


def _tensors(bundle: Bundle, tree: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors that a bundle holds and refers to; those of buffers, which are written in place, in memory."""
    held, referred = scanned_tensors(bundle.open(WEIGHTS)), open_references(bundle)
    twice = sorted(held.keys() & referred.keys())
    if twice:
        raise BundleError(f"bundle {bundle.path} both holds and refers to {twice[0]!r}")
    buffers = _buffers(tree)
    return {
        name: in_memory(tensor) if name in buffers else tensor for name, tensor in (held | referred).items()
    }


def _buffers(tree: Mapping[str, Any]) -> set[str]:
    """The names of all buffers that a program names, as far as the file is valid."""
    names = tree.get("buffers")
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()
