"""Reads the tokenizer of a Hugging Face folder: its files are bounded first, and whatever its library raises is one clear
error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bmgraph.cli.hf_weights import SAFELY
from bmgraph.errors import BmgraphError, InputError
from bmgraph.serialize.bundle import DEEPEST_JSON, check_depth

FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "source.spm", "vocab.model",
)  # fmt: skip
"""A folder with none of these has no tokenizer. (transformers makes one without a vocabulary for some models then.)"""

MOST_BYTES, MOST_VALUES = 256 * 2**20, 4_000_000
"""A vocabulary of 260,000 words with its merges takes 35 MB and 1.8 million values."""


def read_tokenizer(transformers: Any, folder: Path) -> Any:
    """The tokenizer of a folder, None if it has none; raises InputError for one that cannot be read."""
    if not any((folder / name).is_file() for name in FILES):
        return None
    for file in sorted(folder.glob("*.json")):
        if file.name in FILES or "token" in file.name:
            _check(file)
    with told(folder):
        return transformers.AutoTokenizer.from_pretrained(str(folder), **SAFELY)


@contextmanager
def told(folder: object) -> Iterator[None]:
    """Raise InputError for whatever the library of a tokenizer raises: plain Exceptions, and panics, which are not even that."""
    try:
        yield
    except (BmgraphError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"the tokenizer of {folder} cannot be used: {lines[0][:300]}") from error


def _check(file: Path) -> None:
    """Raise InputError for a JSON file that is too large or nested, or no object."""
    if file.stat().st_size > MOST_BYTES:
        raise InputError(f"{file} is larger than {MOST_BYTES // 2**20} MiB: it is not a tokenizer's")
    data = file.read_bytes()
    if sum(map(data.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise InputError(f"{file} has more than {MOST_VALUES} values: it is not a tokenizer's")
    try:
        check_depth(data)
    except ValueError as error:
        raise InputError(
            f"{file} is nested more than {DEEPEST_JSON} levels: it is not a tokenizer's"
        ) from error
    if not data.lstrip().startswith(b"{"):
        raise InputError(f"{file} does not hold a JSON object: restore it")
