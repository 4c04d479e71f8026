"""Small text files that hold several templates, or several sets of label words, of which one is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from bmgraph.errors import InputError

Item = TypeVar("Item")


def small_text(path: str | Path, largest: int, what: str) -> str:
    """The text of a file of `largest` bytes at most; `what` it should hold, for errors. Raises InputError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            data = file.read(largest + 1)
        text = data.decode("utf-8") if len(data) <= largest else None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {what} from {path}: {error}") from error
    if text is None:
        raise InputError(f"{path} is larger than {largest // 2**20} MiB: it is no file of {what}")
    return text


def chosen(items: Sequence[Item], choice: int, path: str | Path, what: str) -> Item:
    """Item `choice` of those in a file, counted from 0; raises InputError if there are fewer."""
    if not 0 <= choice < len(items):
        raise InputError(f"{path} has {len(items)} {what}: choice={choice} is none of them, counted from 0")
    return items[choice]
