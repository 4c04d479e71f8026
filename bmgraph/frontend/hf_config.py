"""Finds the configuration of a Hugging Face model whose weights have given shapes, as of a model that was shrunk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import torch

Shapes = Mapping[str, tuple[int, ...]]

MOST_CHANGES = 4
"""How many fields of a configuration may change together."""
MOST_TRIES = 400
_LATE = ("inner", "intermediate", "head", "dim", "ffn", "size")
"""Parts of names of fields that may be unset, and then follow from others."""


def shapes_of(kind: Any, fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's tensors by name; empty for a configuration that the class does not take."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        with torch.device("meta"):
            model = kind(kind.config_class.from_dict(dict(fields)))
    except (ValueError, TypeError, ArithmeticError, AttributeError, RuntimeError, StrictDataclassError):
        return {}
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def fitting_fields(kind: Any, fields: Mapping[str, Any], wanted: Shapes) -> Iterator[dict[str, Any]]:
    """Each choice of fields to change so that the class has tensors of the `wanted` shapes, by its own names; fewest first.

    Only sizes are changed: those that equal a size which changed, or that it is a multiple of (heads). Several choices may
    fit: half as many heads have the shapes of heads of half the size.
    """
    now = shapes_of(kind, fields)
    wrong = [name for name, shape in wanted.items() if now.get(name) != shape]
    if not wrong:
        yield {}
        return
    changes = {
        (old, new)
        for name in wrong
        if len(now.get(name, ())) == len(wanted[name])
        for old, new in zip(now.get(name, ()), wanted[name])
        if old != new
    }
    right = {name: shape for name, shape in wanted.items() if name not in wrong}
    candidates = []
    for field, value in sorted(set(_candidates(kind.config_class.from_dict(dict(fields)), changes)), key=str):
        found = shapes_of(kind, {**fields, field: value})
        keeps = all(found.get(name) == shape for name, shape in right.items())
        if keeps and ("head_dim" in field or any(found.get(name) != now.get(name) for name in wrong)):
            candidates.append((field, value))
    tries = (
        dict(chosen)
        for count in range(1, MOST_CHANGES + 1)
        for chosen in combinations(candidates, count)
        if len({name for name, _ in chosen}) == count
    )
    for index, chosen in enumerate(tries):
        if index >= MOST_TRIES:
            break
        found = shapes_of(kind, {**fields, **chosen})
        if all(found.get(name) == shape for name, shape in wanted.items()):
            yield chosen


def _candidates(config: Any, changes: set[tuple[int, int]]) -> Iterator[tuple[str, int]]:
    """Fields and values that they may get."""
    for name in config.to_dict():
        value = getattr(config, name, None)
        late = value is None and any(part in name for part in _LATE)
        if not late and (type(value) is not int or value < 1):
            continue
        for old, new in changes:
            if late or value == old:
                yield name, new
            elif isinstance(value, int) and 1 < value < old and old % value == 0:
                if (value * new) % old == 0:
                    yield name, value * new // old  # heads, of the same size
                if "head" in name:
                    yield "head_dim", old // value
