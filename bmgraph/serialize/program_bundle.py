"""Saves a program, with its encoder, weights and example, as a bundle and loads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bmgraph.errors import BundleError
from bmgraph.ir.shared_weights import check_unchanged
from bmgraph.serialize.bundle import Bundle, strict_json, write_bundle
from bmgraph.serialize.outside_operators import trusted_operators
from bmgraph.serialize.program_json import decode, encode
from bmgraph.serialize.safetensors_io import read_tensors, write_tensors
from bmgraph.utils.digest import digest

if TYPE_CHECKING:
    from bmgraph.ir.program import Program

GRAPH, WEIGHTS, EXAMPLE = "program.json", "weights.safetensors", "example.safetensors"
ENCODER = "encoder"
"""Key of the encoder in GRAPH, and prefix of the names of its inputs in EXAMPLE."""


def save_program(program: Program, path: str | Path) -> None:
    """Write a program as a bundle.

    Raises BundleError if it cannot be written, and then leaves no files behind; InputError where the model's weights were
    changed after the program was captured.
    """
    check_unchanged(program.parameters, program.shared)
    tree, tensors, example = encode(program), program.tensors(), dict(program.example)
    if program.encoder is not None:
        tree[ENCODER] = encode(program.encoder)
        tensors = {**program.encoder.tensors(), **tensors}
        example |= {f"{ENCODER}.{name}": value for name, value in program.encoder.example.items()}
    data = json.dumps(tree, allow_nan=False)
    manifest = {
        "passes": [record.text for record in program.history if not record.within],
        "weights": digest(program),
    }
    write_bundle(
        Path(path),
        "program",
        manifest,
        {
            GRAPH: lambda file: _write_text(file, data),
            WEIGHTS: lambda file: write_tensors(file, tensors),
            EXAMPLE: lambda file: write_tensors(file, example),
        },
    )


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def load_program(bundle: Bundle, trusted: tuple[str, ...] = ()) -> Program:
    """The program of a bundle from `read_bundle`; raises BundleError if it is not a valid program.

    It may call operators of the `trusted` packages, which are imported then.
    """
    tensors, example = read_tensors(bundle.open(WEIGHTS)), read_tensors(bundle.open(EXAMPLE))
    tree = strict_json(bundle.open(GRAPH))
    if not isinstance(tree, dict):
        raise BundleError(
            f"{GRAPH!r} in bundle {bundle.path} does not hold a program: it is not a JSON object"
        )
    trees = [item for item in (tree, tree.get(ENCODER)) if isinstance(item, dict)]
    outside = trusted_operators(trees, trusted)
    if ENCODER not in tree:
        return decode(tree, tensors, example, outside)
    own, of_encoder = _named(tree, tensors), _named(tree[ENCODER], tensors)
    if {*own, *of_encoder} != set(tensors):
        raise BundleError("the tensors in the file are not the ones that the program names")
    prefix = f"{ENCODER}."
    program = decode(tree, own, {k: v for k, v in example.items() if not k.startswith(prefix)}, outside)
    program.encoder = decode(
        tree[ENCODER],
        of_encoder,
        {k.removeprefix(prefix): v for k, v in example.items() if k.startswith(prefix)},
        outside,
    )
    return program


def _named(tree: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that a program names, except missing ones (`decode` refuses those)."""
    try:
        names = [*tree["parameters"], *tree["buffers"]]
        return {name: tensors[name] for name in names if name in tensors}
    except (KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"the file does not hold a valid program: {error}") from error
