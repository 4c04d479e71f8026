"""Programs as bundles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from bmgraph.bundle import Bundle, strict_json, write_bundle
from bmgraph.digest import digest
from bmgraph.program_json import decode, encode
from bmgraph.tensors import read_tensors, write_tensors

if TYPE_CHECKING:
    from bmgraph.program import Program

GRAPH, WEIGHTS, EXAMPLE = "program.json", "weights.safetensors", "example.safetensors"


def save_program(program: Program, path: str | Path) -> None:
    """Write a program as a bundle; raises BundleError where it cannot be written, and then leaves nothing."""
    data = json.dumps(encode(program), allow_nan=False)
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
            WEIGHTS: lambda file: write_tensors(file, program.tensors()),
            EXAMPLE: lambda file: write_tensors(file, program.example),
        },
    )


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def load_program(bundle: Bundle) -> Program:
    """The program of a checked bundle; raises BundleError where it is no legal program."""
    tensors = read_tensors(bundle.file(WEIGHTS))
    return decode(strict_json(bundle.file(GRAPH)), tensors, read_tensors(bundle.file(EXAMPLE)))
