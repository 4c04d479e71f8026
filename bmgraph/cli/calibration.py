"""Reads the batches that passes measure on: texts, tensors in a file, or the built-in sentences."""

from __future__ import annotations

from pathlib import Path

from bmgraph.cli.model_source import TEXTS, Batch, Source
from bmgraph.errors import InputError
from bmgraph.serialize.safetensors_io import read_tensors

ROWS = 4
"""Texts in a batch."""

BUILT_IN = (
    "calibrated on 16 built-in sentences: give --calibration FILE with texts like yours for better scales"
)


def calibration_batches(
    source: Source, file: Path | None, length: int, windows: bool = False
) -> tuple[list[Batch] | list[str] | None, str]:
    """The batches of a file, or the built-in sentences where a model reads text, and what a user should know of them.

    None without a file for a model that reads no text. With `windows` the texts of a file are given as they are: `compile` takes
    windows of their tokens, without padding, which is what a decoder reads. Raises InputError for a file that cannot be read, or with texts
    for a model that reads none.
    """
    if file is None:
        if source.batch_of is None:
            return None, ""
        return source.batches(list(TEXTS), ROWS, length), BUILT_IN
    if not file.is_file():
        raise InputError(f"there is no regular file {file}")
    if file.suffix == ".safetensors":
        return [read_tensors(file)], ""
    if source.batch_of is None:
        raise InputError(
            f"{source.name} reads no text, so it cannot be calibrated on {file}: give a .safetensors file that holds one "
            f"batch of {', '.join(source.example)}"
        )
    return _lines(file) if windows else source.batches(_lines(file), ROWS, length), ""


def _lines(file: Path) -> list[str]:
    try:
        texts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file}: {error}") from error
    if not texts:
        raise InputError(f"{file} is empty: give one text a line")
    return texts
