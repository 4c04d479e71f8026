"""Finds the files of weights in a Hugging Face folder: one safetensors file, or several that an index names."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any

from bmgraph.errors import InputError
from bmgraph.serialize.bundle import LARGEST_JSON, parse_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights; raises InputError unless they are safetensors files in the folder."""
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder} holds both a model and a PEFT adapter: move the adapter (adapter_config.json, adapter_model.safetensors) "
            "into a folder of its own, and put it on the model with the pass LoadDelta"
        )
    named = config.get("transformers_weights")
    chosen = (
        named if named is not None else next((n for n in (WEIGHTS, INDEX) if (folder / n).is_file()), None)
    )
    if chosen is None:
        pickled = next((item.name for item in sorted(folder.iterdir()) if item.suffix in PICKLED), None)
        if pickled:
            raise InputError(
                f"{folder} holds its weights in {pickled}, which is pickled and can run code when it is read: load it where you "
                "trust it and write it again by model.save_pretrained(folder), which makes safetensors"
            )
        raise InputError(f"{folder} holds no {WEIGHTS} and no {INDEX}: there are no weights to read")
    if not isinstance(chosen, str) or not chosen.endswith((".safetensors", ".safetensors.index.json")):
        raise InputError(
            f"{folder}/config.json names the weights {str(chosen)[:80]!r}: expected a safetensors file"
        )
    if not chosen.endswith(".json"):
        return [_inside(folder, chosen)]
    parts = read_json(_inside(folder, chosen)).get("weight_map")
    if not isinstance(parts, dict) or not parts:
        raise InputError(f"{folder / chosen} has no 'weight_map' from weights to files")
    return [_inside(folder, part) for part in dict.fromkeys(map(str, parts.values()))]


def _inside(folder: Path, name: str) -> Path:
    """A file of a folder by its name; raises InputError if the name leads elsewhere or to no safetensors file."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", name) or not name.endswith(
        (".safetensors", ".json")
    ):
        raise InputError(
            f"{folder} names the file of weights {name[:80]!r}: expected the plain name of a safetensors file in the folder"
        )
    if not (folder / name).is_file():
        raise InputError(f"{folder} lacks {name}, which its index names: complete the folder")
    return folder / name


def check_regular_files(folder: Path) -> None:
    """Raise InputError if the folder holds a pipe, a device or a dangling link, which would block or feed the reader.

    A link to a regular file is one: downloaded folders consist of them.
    """
    for item in sorted(folder.iterdir()):
        try:
            mode = item.stat().st_mode
        except OSError as error:
            raise InputError(f"{item} cannot be read: {error.strerror}; restore or remove it") from error
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise InputError(f"{item} is not a regular file (a pipe or a device): remove it")


def read_json(file: Path) -> dict[str, Any]:
    """An object in a JSON file; raises InputError, naming the file, if it holds none, or is too large or nested."""
    try:
        if file.stat().st_size > LARGEST_JSON:
            raise InputError(f"{file} is larger than {LARGEST_JSON // 2**20} MiB")
        found = parse_json(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read: {str(error)[:200]}") from error
    if not isinstance(found, dict):
        raise InputError(f"{file} holds a {type(found).__name__}: expected a JSON object of settings")
    return found
