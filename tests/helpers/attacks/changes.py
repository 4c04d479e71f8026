"""Changes of a saved folder that attacks are made of: each takes the folder and edits its files."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.helpers.bundles import edit_json

Change = Callable[[Path], object]


def say(file: str, **fields: Any) -> Change:
    """Set fields of a JSON file."""
    return lambda folder: edit_json(folder / file, lambda value: value.update(fields))


def unsay(file: str, *fields: str) -> Change:
    """Remove fields of a JSON file."""
    return lambda folder: edit_json(
        folder / file, lambda value: [value.pop(name) for name in fields] and None
    )


def written(file: str, data: bytes) -> Change:
    """Replace the contents of a file, or add one."""
    return lambda folder: (folder / file).write_bytes(data)


def removed(file: str) -> Change:
    """Remove a file."""
    return lambda folder: (folder / file).unlink()


def cut(file: str, share: float = 0.5) -> Change:
    """Keep only the first bytes of a file."""
    return lambda folder: os.truncate(folder / file, int((folder / file).stat().st_size * share))


def linked(file: str, target: str) -> Change:
    """Have a link in the place of a file."""

    def change(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(target)

    return change


def piped(file: str) -> Change:
    """Have a pipe in the place of a file, to which nobody writes."""

    def change(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file)

    return change


def tensors(file: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Edit the tensors of a file, by name."""

    def change(folder: Path) -> None:
        found = load_file(folder / file)
        edit(found)
        save_file(
            {name: value.contiguous() for name, value in found.items()}, folder / file, {"format": "pt"}
        )

    return change


def header(file: str, edit: Callable[[dict[str, Any]], object]) -> Change:
    """Edit the header of a tensors file, and leave its data."""

    def change(folder: Path) -> None:
        data = (folder / file).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        found = json.loads(data[8 : 8 + length])
        edit(found)
        text = json.dumps(found).encode()
        text += b" " * (-len(text) % 8)
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return change


def first(found: dict[str, Any]) -> dict[str, Any]:
    """The first entry of a header."""
    entry: dict[str, Any] = found[next(name for name in found if name != "__metadata__")]
    return entry


def both(*changes: Change) -> Change:
    """Several changes, one after the other."""
    return lambda folder: [change(folder) for change in changes]
