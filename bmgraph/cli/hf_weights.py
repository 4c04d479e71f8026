"""Loads the weights of a Hugging Face folder, all of them and nothing else: none is invented, none is left out, no code runs.

transformers gives a weight that its folder does not hold random values, and goes on.
"""

from __future__ import annotations

import inspect
import json
import re
import stat
import struct
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bmgraph.errors import InputError
from bmgraph.serialize.bundle import LARGEST_JSON, parse_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SAFELY: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Options for everything that transformers reads: nothing is downloaded, and no code of a folder runs."""

_LARGEST_HEADER = 64 * 2**20


def load_pretrained(loader: Any, folder: Path, **options: Any) -> Any:
    """The model of a folder, made by `loader.from_pretrained`.

    Raises InputError, before transformers reads the weights, if a file that it would read is not a regular one, lies outside
    the folder or is pickled; and afterwards if the folder lacks a weight, or holds one of another shape or of no use.
    (Tied weights are stored once; heads that another class of the same architecture has may be there too.)
    """
    check_regular_files(folder)
    files = _weight_files(folder)
    model, found = _from_pretrained(loader, folder, options)
    _check_complete(folder, model, found, files)
    return model


def _from_pretrained(loader: Any, folder: Path, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """What transformers reads, and what it says of the names; raises InputError for a class or file that it cannot read."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    is_model = inspect.isclass(loader) and issubclass(loader, nn.Module)
    if not is_model and not hasattr(loader, "_model_mapping"):  # AutoModel has it
        raise InputError(f"{folder}/config.json names a class under 'architectures' that is not a model")
    try:
        model, found = loader.from_pretrained(
            str(folder), use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True, **SAFELY, **options
        )  # fmt: skip
    except (
        OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, ImportError, MemoryError,
        AssertionError, StrictDataclassError, SafetensorError,
    ) as error:  # fmt: skip
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{folder} cannot be read: {lines[0][:300]}") from error
    return model, found


def _check_complete(folder: Path, model: nn.Module, found: dict[str, Any], files: list[Path]) -> None:
    """Raise InputError unless every parameter has its value from the folder, and every stored value its parameter."""
    mismatched = sorted(found["mismatched_keys"])
    if mismatched:
        name, stored, expected = mismatched[0]
        raise InputError(
            f"{folder} holds {name} of shape {list(stored)}, but its config.json says {list(expected)}"
            f"{_more(mismatched)}: take weights and config.json of one model"
        )
    missing = sorted({*found["missing_keys"], *_invented(model, files)})
    if missing:
        raise InputError(
            f"{folder} holds no weights for {missing[0]}{_more(missing)}, which would get random values: complete the folder, "
            f"or name the class that the weights are of under 'architectures' in its config.json (read as {type(model).__name__})"
        )
    useless = _useless(model, found["unexpected_keys"])
    if useless:
        raise InputError(
            f"{folder} holds weights for {useless[0]}{_more(useless)}, which a {type(model).__name__} of its config.json does not "
            "have: take weights and config.json of one model"
        )
    errors = found.get("error_msgs") or found.get("conversion_errors")
    if errors:
        raise InputError(f"{folder} cannot be read: {str(errors)[:200]}")


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


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights; raises InputError unless they are safetensors files in the folder."""
    config = read_object(folder / "config.json")
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
    parts = read_object(_inside(folder, chosen)).get("weight_map")
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


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object in a file; raises InputError if it is too large, nested or not an object."""
    try:
        if file.stat().st_size > LARGEST_JSON:
            raise InputError(f"{file} is larger than {LARGEST_JSON // 2**20} MiB")
        value = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} does not hold a JSON object")
    return value


def _invented(model: Any, files: Iterable[Path]) -> list[str]:
    """Parameters that no file holds, but that transformers does not count as missing, by exceptions of the class."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    if not patterns:
        return []
    excused = re.compile("|".join(f"({pattern})" for pattern in patterns))
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    suspects = [
        name for name, _ in model.named_parameters() if excused.search(name) is not None and name not in tied
    ]
    if not suspects:
        return []
    stored = {name for file in files for name in _names_in(file)}
    prefix = f"{model.base_model_prefix}."
    return [name for name in suspects if not {name, f"{prefix}{name}", name.removeprefix(prefix)} & stored]


def _names_in(file: Path) -> list[str]:
    """The names of the tensors in a safetensors file."""
    with open(file, "rb") as stream:
        length = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))[0]
        if length > _LARGEST_HEADER:
            raise InputError(f"{file} claims a header of {length} bytes")
        header = json.loads(stream.read(length))
    return [str(name) for name in header if name != "__metadata__"]


def _useless(model: Any, unexpected: Iterable[str]) -> list[str]:
    """Stored weights that no class of the model's architecture has (with this configuration), such as those of a layer more."""
    left = set(unexpected)
    classes: list[tuple[str, Any]] = inspect.getmembers(
        import_module(type(model).__module__), inspect.isclass
    )
    for _, kind in classes:
        if not left:
            break
        if getattr(kind, "config_class", None) is not type(model.config) or not hasattr(
            kind, "from_pretrained"
        ):
            continue
        try:
            with torch.device("meta"):
                other = kind(model.config)
        except (ValueError, TypeError, AttributeError, NotImplementedError, ImportError):
            continue  # a class that needs another configuration, or none at all (an abstract one)
        known = set(other.state_dict())
        prefix = f"{other.base_model_prefix}."
        left -= known | {
            name for name in left if f"{prefix}{name}" in known or name.removeprefix(prefix) in known
        }
    return sorted(left)


def _more(names: list[Any]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
