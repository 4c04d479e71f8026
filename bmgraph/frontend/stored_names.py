"""Which weights of a file are those of which tensors of a model, by their names, as transformers reads them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn


def names_in_file(model: nn.Module, known: Collection[str], stored: Iterable[str]) -> dict[str, str]:
    """The name in the file of each tensor of the model in `known` that the file holds.

    Models with a head and their base without one differ by a prefix (`base_model_prefix`), which one of them may lack.
    """
    found: dict[str, str] = {}
    for name in stored:
        match = next((spelling for spelling in spellings(model, name) if spelling in known), None)
        if match is not None:
            found.setdefault(match, name)
    return found


def unknown_names(model: nn.Module, names: Mapping[str, str], stored: Iterable[str]) -> list[str]:
    """Stored weights that are of no use for the model, nor for another class of its architecture."""
    left = set(stored) - set(names.values())
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    buffers = {name for name, _ in model.named_buffers()}  # some files hold what is computed anyway
    left = {name for name in left if name not in buffers and not any(re.search(p, name) for p in patterns)}
    return useless_names(model, left) if hasattr(model, "config") else sorted(left)


def spellings(model: Any, name: str) -> tuple[str, ...]:
    """A name, with and without the prefix that the class of a model has in front of its base."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return name, f"{prefix}{name}", name.removeprefix(prefix)


def useless_names(model: Any, unexpected: Iterable[str]) -> list[str]:
    """Stored weights that no class of the model's architecture has (with this configuration), such as those of a layer more."""
    left = set(unexpected)
    if not left:
        return []
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
