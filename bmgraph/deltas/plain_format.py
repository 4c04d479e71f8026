"""A folder format for deltas on linears of families that PEFT does not have: one tensor a key of the family.

`adapter_config.json` holds `peft_type`, the family's; `numbers`, those of each module; `options`, those of all deltas.
`adapter_model.safetensors` holds `base_model.model.<module>.<family>_<key>`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bmgraph.deltas.family import PREFIX, Change, Part, Saved
from bmgraph.deltas.file_values import check_values
from bmgraph.deltas.forms import Hole
from bmgraph.deltas.linear_family import LinearFamily
from bmgraph.deltas.one_each import one_each
from bmgraph.deltas.peft_config import is_number, number
from bmgraph.errors import BundleError, InputError
from bmgraph.ir.program import Program

NUMBERS, OPTIONS = "numbers", "options"
KNOWN = frozenset(
    {"peft_type", "modules_to_save", "bias", "ensure_weight_tying", "class_rows", NUMBERS, OPTIONS}
)


def plain_saved(family: LinearFamily, program: Program) -> Saved | None:
    """What a folder holds of a family's deltas; None without any.

    Raises InputError for numbers and options that the family does not declare, and as `one_each`.
    """
    deltas = one_each(family, program)
    if not deltas:
        return None
    changes = {module: delta.change(program) for module, delta in deltas.items()}
    for change in changes.values():
        if set(change.numbers) != set(family.numbers):
            raise InputError(
                f"a delta of the family {family.name!r} has the numbers {', '.join(change.numbers) or 'none'}, and the family "
                f"declares {', '.join(family.numbers) or 'none'}: name them in its class variable `numbers`"
            )
    tensors = {
        f"{PREFIX}{family.name}_{key}"
        if key in family.shared
        else f"{PREFIX}{module}.{family.name}_{key}": tensor
        for module, change in changes.items()
        for key, tensor in change.tensors.items()
    }
    numbers = {module: dict(change.numbers) for module, change in changes.items()}
    options = next(iter(deltas.values())).options
    undeclared = sorted(set(options) - set(family.choices))
    if undeclared:
        raise InputError(
            f"a delta of the family {family.name!r} has the option {undeclared[0]!r}, which the family does not declare: name it in "
            "its class variable `choices`"
        )
    return Saved(family, {NUMBERS: numbers, OPTIONS: dict(options)}, tensors)


def plain_loaded(
    family: LinearFamily, path: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]
) -> Part:
    """The change of each module, taken out of `tensors`. Raises BundleError for what `plain_saved` did not write."""
    unknown = sorted(set(config) - KNOWN)
    if unknown:
        raise BundleError(
            f"{path} has {unknown[0][:80]}, which deltas of the family {family.name!r} do not have"
        )
    numbers, options = config.get(NUMBERS), config.get(OPTIONS)
    if not isinstance(numbers, dict) or not isinstance(options, dict):
        raise BundleError(f"{path} has no {NUMBERS} and {OPTIONS}: expected an object of each")
    found: dict[str, dict[str, torch.Tensor]] = {}
    names = {key: f"{PREFIX}{family.name}_{key}" for key in family.shared}
    missing = [name for name in names.values() if name not in tensors]
    if missing:
        raise BundleError(f"{path} holds no {missing[0]!r}, which all its deltas share")
    shared = {key: tensors.pop(name) for key, name in names.items()}
    for name in list(tensors):
        module, _, end = name.removeprefix(PREFIX).rpartition(".")
        key = end.removeprefix(f"{family.name}_")
        if name.startswith(PREFIX) and end != key and key in family.keys:
            found.setdefault(module, dict(shared))[key] = tensors.pop(name)
    if set(found) != set(numbers):
        raise BundleError(f"{path} names other modules in {NUMBERS} than its tensors do")
    for module, own in found.items():
        if set(own) != set(family.keys) or not isinstance(numbers[module], dict):
            raise BundleError(
                f"{path} has {', '.join(sorted(own))} of {module}: expected {', '.join(sorted(family.keys))}, and an object of "
                f"its {NUMBERS}"
            )
        for key, value in own.items():
            _check_tensor(path, f"{key} of {module}", value)
            axes = family.axes.get(key, value.dim())
            if value.dim() != axes or not value.numel():
                raise BundleError(
                    f"{path}: {key} of {module} has the shape {list(value.shape)}: expected {axes} axes of at least one entry"
                )
        for key in numbers[module]:
            number(path, numbers[module], key, 0.0)
        if set(numbers[module]) != set(family.numbers):
            raise BundleError(
                f"{path} has the {NUMBERS} {', '.join(sorted(map(str, numbers[module])))[:80] or 'none'} of {module}: expected "
                f"{', '.join(family.numbers) or 'none'}, as the family {family.name!r} declares"
            )
        _check_sizes(family, path, module, Change(own, numbers[module]))
    _check_options(family, path, options)
    return Part(
        family, path, {module: Change(own, numbers[module]) for module, own in found.items()}, options
    )


def _check_options(family: LinearFamily, path: Path, options: Mapping[str, Any]) -> None:
    """Raise BundleError for other options, or other values of them, than the family has."""
    unknown = sorted(set(options) - set(family.choices))
    if unknown:
        raise BundleError(
            f"{path} has {unknown[0][:80]!r} in {OPTIONS}, which the family {family.name!r} does not have: expected "
            f"{', '.join(family.choices) or 'none'}"
        )
    for name, values in family.choices.items():
        numbers = any(isinstance(value, Hole) for value in values)
        value = options.get(name)
        if value not in values and not (numbers and is_number(value)):
            raise BundleError(
                f"{path} has {name}={str(value)[:80]!r}: expected one of {', '.join(map(str, values))}, as the family "
                f"{family.name!r} has it"
            )


def _check_sizes(family: LinearFamily, path: Path, module: str, change: Change) -> None:
    """Raise BundleError for tensors of which the family cannot tell which linear they fit."""
    try:
        family.sizes(change)
        family.describe(change)
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        shapes = ", ".join(f"{key}{list(tensor.shape)}" for key, tensor in change.tensors.items())
        raise BundleError(
            f"{path}: {shapes} of {module} are not what the family {family.name!r} saves ({str(error)[:80]})"
        ) from error


def _check_tensor(path: Path, name: str, value: torch.Tensor) -> None:
    """Raise BundleError for a tensor that is not of floating-point numbers that fp32 holds."""
    if not value.is_floating_point():
        raise BundleError(f"{path}: {name} is {value.dtype}, not floating-point numbers")
    check_values(path, name, value)
    if value.numel() and float(value.abs().max()) > torch.finfo(torch.float32).max:
        raise BundleError(
            f"{path}: {name} is beyond what fp32 holds: it was altered, or its training diverged"
        )
