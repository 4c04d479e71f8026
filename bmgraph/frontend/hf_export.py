"""Writes a program's weights as a Hugging Face folder, under the names of the folder that its model came from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from bmgraph.errors import BundleError, InputError
from bmgraph.frontend.eager_check import EAGER_TOLERANCE, numbered
from bmgraph.frontend.hf_config import fitting_fields
from bmgraph.frontend.own_run import own_run
from bmgraph.frontend.stored_names import names_in_file
from bmgraph.ir.program import Program
from bmgraph.serialize.aside import folder_aside, user_modes
from bmgraph.serialize.bundle import cannot_save
from bmgraph.serialize.opened import open_user_file
from bmgraph.serialize.safetensors_io import stream_tensors
from bmgraph.serialize.stored_file import stored_tensors
from bmgraph.serialize.weight_files import INDEX, PICKLED, WEIGHTS, read_json, weight_files
from bmgraph.utils.stored_tensor import StoredTensor
from bmgraph.verify.metrics import relative_error

HALF_TOLERANCE = 3e-2
MOST_CHOICES = 8
"""How many configurations of fitting shapes are tried."""
COPIED = (".json", ".txt", ".model", ".jinja", ".bpe")
"""Endings of the files that are copied: configuration and tokenizer, no code."""
TORCH_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}


def save_pretrained(program: Program, path: Path, like: Path) -> None:
    """Write a folder that transformers reads; see `Program.save_pretrained`."""
    config = _config(like)
    stored = _stored(like)
    names = _names(program, stored, like)
    kind = _class(config, like)
    tensors = {name: program.tensor(names[name]) if name in names else item for name, item in stored.items()}
    choices = _configs(kind, config, {name: tensors[name] for name in names}, stored, like)
    path = path.absolute()
    with cannot_save(path):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise BundleError(f"cannot save {path}: it exists; choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        with folder_aside(path) as aside:
            modes = user_modes(aside)
            _write(aside, tensors, like)
            _choose(program, kind, choices, aside, like)
            for file in aside.iterdir():
                file.chmod(modes[0])
            aside.chmod(modes[1])
            if path.exists():
                path.rmdir()
            aside.rename(path)


def _config(like: Path) -> dict[str, Any]:
    if not (like / "config.json").is_file():
        raise InputError(
            f"like={str(like)!r}: give the Hugging Face folder that the model came from, with its config.json"
        )
    return read_json(like / "config.json")


def _stored(like: Path) -> dict[str, StoredTensor]:
    """The tensors of the folder's files by name; none is read."""
    found: dict[str, StoredTensor] = {}
    for file in weight_files(like):
        found |= stored_tensors(open_user_file(file, "folder"), file.absolute(), False)
    return found


def _names(program: Program, stored: Mapping[str, torch.Tensor], like: Path) -> dict[str, str]:
    """The program's tensor of each name in the folder, where it has one; names may differ by one prefix, that of a base model.

    Raises InputError for a parameter that the folder has no name for.
    """
    known = {*program.parameters, *program.buffers, *program.ties}
    found: dict[str, str] = {}
    for spelled in _prefixes(known, stored):
        matches = {name: spelled(name) for name in stored if spelled(name) in known}
        if len(matches) > len(found):
            found = matches
    covered = {program.ties.get(name, name) for name in found.values()}
    left = sorted(set(program.parameters) - covered)
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise InputError(
            f"the program cannot be written as the model of {like}, which has no name for its {left[0]!r}{more}: merge deltas by "
            "Merge() first (or write them alone by save_delta), and quantise, prune or split experts after writing"
        )
    return found


def _prefixes(known: set[str], stored: Mapping[str, torch.Tensor]) -> list[Any]:
    """Functions from a name in the folder to the program's: the same, and with the first part added or removed."""
    first = {name.split(".", 1)[0] + "." for name in known} | {name.split(".", 1)[0] + "." for name in stored}
    added = [lambda name, prefix=prefix: prefix + name for prefix in sorted(first)]
    removed = [
        lambda name, prefix=prefix: name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
        for prefix in sorted(first)
    ]
    return [lambda name: name, *added, *removed]


def _class(config: Mapping[str, Any], like: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            'writing a Hugging Face folder needs transformers: pip install "bmgraph[hf]"'
        ) from error
    names = config.get("architectures") or [""]
    kind = getattr(transformers, str(names[0]), None)
    if kind is None or not hasattr(kind, "config_class"):
        raise InputError(
            f"{like}/config.json names the class {names[0]!r} under 'architectures', which transformers does not have"
        )
    return kind


def _configs(
    kind: Any,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    stored: Mapping[str, torch.Tensor],
    like: Path,
) -> list[dict[str, Any]]:
    """The configurations that say the sizes and the type of the weights; raises InputError if there is none."""
    wrong = [name for name, tensor in tensors.items() if tensor.shape != stored[name].shape]
    found: list[dict[str, Any]] = [{}]
    if wrong:
        own = _own_names(kind, config, tensors)
        wanted = {own[name]: tuple(tensors[name].shape) for name in own}
        found = list(islice(fitting_fields(kind, config, wanted), MOST_CHOICES))
    if not found:
        name = wrong[0]
        raise InputError(
            f"no configuration of {kind.__name__} was found for the shapes of this program: {name!r} is "
            f"{list(tensors[name].shape)}, in {like} it is {list(stored[name].shape)} ({len(wrong)} differ); transformers needs "
            "layers of one size: shrink all layers alike, or save the program as a bundle"
        )
    kinds = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    before = {stored[name].dtype for name, tensor in tensors.items() if tensor.is_floating_point()}
    more: dict[str, Any] = {}
    if kinds != before and len(kinds) == 1:
        key = "dtype" if "dtype" in config else "torch_dtype"
        more = {key: TORCH_NAMES.get(next(iter(kinds)), "float32")}
    return [{**config, **changes, **more} for changes in found]


def _own_names(kind: Any, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The class's own name of each tensor of the folder that it has."""
    with torch.device("meta"):
        model = kind(kind.config_class.from_dict(dict(config)))
    return {stored: own for own, stored in names_in_file(model, set(model.state_dict()), tensors).items()}


def _write(aside: Path, tensors: Mapping[str, torch.Tensor], like: Path) -> None:
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered.items()}
    stream_tensors(aside / WEIGHTS, entries, ordered.values(), {"format": "pt"})
    for file in sorted(like.iterdir()):
        is_weights = (
            file.name == INDEX
            or file.suffix in (*PICKLED, ".safetensors")
            or file.name.endswith(".index.json")
        )
        if file.is_file() and file.suffix in COPIED and not is_weights and not file.name.startswith("."):
            shutil.copyfile(file, aside / file.name)


def _choose(program: Program, kind: Any, choices: Sequence[dict[str, Any]], aside: Path, like: Path) -> None:
    """Write the first configuration with which the folder is the program; raises the error of the first if none is."""
    first: InputError | None = None
    for fields in choices:
        (aside / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        try:
            _verify(program, kind, aside, like)
        except InputError as error:
            first = first or error
        else:
            return
    assert first is not None
    raise first


def _verify(program: Program, kind: Any, aside: Path, like: Path) -> None:
    """Raise InputError unless transformers reads the folder as a model that gives the program's outputs on its example."""
    if not program.example:
        raise InputError("the program has no example to compare the written model with: capture it with one")
    model, found = kind.from_pretrained(
        str(aside), local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True, dtype="auto"
    )  # fmt: skip
    problems = sorted(map(str, (*found["missing_keys"], *found["mismatched_keys"])))
    if problems:
        raise InputError(
            f"the program cannot be written as the model of {like}: transformers does not find {problems[0]}"
        )
    model.eval()
    with own_run(model):
        expected, written = program(**program.example), numbered(model(**program.example))
    half = any(
        tensor.dtype.itemsize < 4 for tensor in program.parameters.values() if tensor.is_floating_point()
    )
    most = HALF_TOLERANCE if half else EAGER_TOLERANCE
    for (name, value), other in zip(expected.items(), written.values()):
        error = relative_error(other, value) if other.shape == value.shape else float("inf")
        if not error <= most:
            raise InputError(
                f"the program cannot be written as the model of {like}: as transformers reads it, output {name!r} differs by "
                f"{error:.2g} (relative L2): passes changed more than weights"
            )
