"""Loads the weights of a Hugging Face folder, all of them and nothing else: none is invented, none is left out, no code runs.

transformers gives a weight that its folder does not hold random values, and goes on.
"""

from __future__ import annotations

import inspect
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from bmgraph.cli.hf_sizes import BoundedSizes, Sayer, check_counts
from bmgraph.errors import InputError
from bmgraph.frontend.stored_names import spellings, useless_names
from bmgraph.serialize.bundle import parse_json
from bmgraph.serialize.safetensors_io import LARGEST_HEADER
from bmgraph.serialize.weight_files import check_regular_files, read_json, weight_files
from bmgraph.utils.element_count import element_count

SAFELY: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Options for everything that transformers reads: nothing is downloaded, and no code of a folder runs."""

MOST_TENSORS = 100_000
"""How many tensors a file may hold: what is known of one takes about 1 KB."""
FLOATS = ("F32", "BF16", "F16", "F64")
"""Types of weights, by safetensors' names."""


class Stored(NamedTuple):
    """What the header of a file says of a tensor: its type, by safetensors' name, and its shape."""

    kind: str
    shape: tuple[int, ...]


StoredByFile = Mapping[Path, Mapping[str, Stored]]


def load_pretrained(loader: Any, folder: Path, **options: Any) -> Any:
    """The model of a folder, made by `loader.from_pretrained`.

    Raises InputError, before transformers reads the weights, if a file that it would read is not a regular one, lies outside
    the folder or is pickled; and afterwards if the folder lacks a weight, or holds one of another shape or of no use.
    (Tied weights are stored once; heads that another class of the same architecture has may be there too.)
    """
    check_regular_files(folder)
    files = weight_files(folder)
    stored = {file: _stored_in(file) for file in files}
    _check_once(folder, stored)
    shapes = [item.shape for found in stored.values() for item in found.values()]
    sayer = Sayer.of_folder(folder)
    check_counts(
        sayer,
        read_json(folder / "config.json"),
        max([len(shapes), *(size for shape in shapes for size in shape)]),
    )
    with BoundedSizes(sayer, sum(map(element_count, shapes)), len(shapes)):
        model, found = from_pretrained(loader, folder, folder, use_safetensors=True, **options)
    _check_complete(folder, model, found, stored)
    return model


def from_pretrained(
    loader: Any, folder: Path, source: Path, **options: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """What transformers reads, and what it says of the names; raises InputError, naming `source`, for a class or file that it
    cannot read."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    is_model = inspect.isclass(loader) and issubclass(loader, nn.Module)
    if not is_model and not hasattr(loader, "_model_mapping"):  # AutoModel has it
        raise InputError(f"{folder}/config.json names a class under 'architectures' that is not a model")
    try:
        model, found = loader.from_pretrained(
            str(folder), ignore_mismatched_sizes=True, output_loading_info=True, **SAFELY, **options
        )  # fmt: skip
    except InputError:
        raise
    except (
        OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, ImportError, MemoryError,
        AssertionError, StrictDataclassError, SafetensorError,
    ) as error:  # fmt: skip
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{source} cannot be read: {lines[0][:300]}") from error
    return model, found


def _check_complete(folder: Path, model: nn.Module, found: dict[str, Any], stored: StoredByFile) -> None:
    """Raise InputError unless every parameter has its value from the folder, and every stored value its parameter."""
    check_weights_found(folder, model, found, _invented(model, stored))
    _check_types(folder, model, stored)
    useless = useless_names(model, found["unexpected_keys"])
    if useless:
        raise InputError(
            f"{folder} holds weights for {useless[0]}{_more(useless)}, which a {type(model).__name__} of its config.json does not "
            "have: take weights and config.json of one model"
        )
    errors = found.get("error_msgs") or found.get("conversion_errors")
    if errors:
        raise InputError(f"{folder} cannot be read: {str(errors)[:200]}")


def check_weights_found(
    source: Path, model: nn.Module, found: Mapping[str, Any], invented: Sequence[str] = ()
) -> None:
    """Raise InputError for a weight that transformers did not find in a folder or file, or found in another shape."""
    mismatched = sorted(found["mismatched_keys"])
    if mismatched:
        name, stored, expected = mismatched[0]
        raise InputError(
            f"{source} holds {name} of shape {list(stored)}, but its config.json says {list(expected)}"
            f"{_more(mismatched)}: take weights and config.json of one model"
        )
    missing = sorted({*found["missing_keys"], *invented})
    if missing and source.is_file():
        raise InputError(
            f"{source} holds no weights for {missing[0]}{_more(missing)}, which would get random values: take the file anew from "
            f"where it comes (read as {type(model).__name__})"
        )
    if missing:
        raise InputError(
            f"{source} holds no weights for {missing[0]}{_more(missing)}, which would get random values: complete the folder, "
            f"or name the class that the weights are of under 'architectures' in its config.json (read as {type(model).__name__})"
        )


def _invented(model: Any, stored: StoredByFile) -> list[str]:
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
    known = {name for found in stored.values() for name in found}
    return [name for name in suspects if not set(spellings(model, name)) & known]


def _check_types(folder: Path, model: nn.Module, stored: StoredByFile) -> None:
    """Raise InputError where a weight is stored as numbers that transformers would cast to what they do not mean.

    Integers, complex numbers and those of 8 bits are no weights without the scales that they were made with.
    """
    tensors = model.state_dict()
    for file, found in stored.items():
        for name, (kind, _) in found.items():
            if kind in FLOATS:
                continue
            for spelling in spellings(model, name):
                if spelling in tensors and tensors[spelling].is_floating_point():
                    raise InputError(
                        f"{folder} holds {name} as {kind} in {file.name}, where a {type(model).__name__} has floating-point "
                        f"numbers: expected one of {', '.join(FLOATS)}; take the folder of weights that are not quantised"
                    )


def _check_once(folder: Path, stored: StoredByFile) -> None:
    """Raise InputError for a weight that two files hold: which of them counts is chance."""
    seen: dict[str, Path] = {}
    for file, found in stored.items():
        for name in found:
            if name in seen:
                raise InputError(
                    f"{folder} holds {name} both in {seen[name].name} and in {file.name}: remove it from one of them, or take "
                    "the folder anew"
                )
            seen[name] = file


def _stored_in(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, by name, as its header says; InputError for one that cannot be read."""
    try:
        with open(file, "rb") as stream:
            length = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))[0]
            if not 2 <= length <= LARGEST_HEADER:
                raise InputError(f"{file} claims a header of {length} bytes: restore the file")
            text = stream.read(length)
        if text.count(b'"dtype"') > MOST_TENSORS:
            raise InputError(
                f"{file} holds more than {MOST_TENSORS} tensors: no model that can be read here has as many"
            )
        header = parse_json(text)
        return {
            name: Stored(str(entry["dtype"]), tuple(map(int, entry["shape"])))
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{file} cannot be read: its header is not one of safetensors ({str(error)[:200]})"
        ) from error


def _more(names: list[Any]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
