"""The layout of a KV cache in files: names by role; files of early versions say nothing of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bmgraph.errors import BundleError
from bmgraph.ir.cache_spec import CacheLayout, SlotNames
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.serialize.early_files import cache_of_names

KEY = "cache"
IN_PLACE = "in place"
"""Stands behind the axis of a slot that is appended in place."""

ALIKE = "rows_alike"
"""Key of whether rows run together only if they have the same padding."""

ENDS = "ends"
"""Key of the input by which the engine says where rows end."""

OWN_MASK = "own_mask"
"""Key of whether batches may leave out the mask, which came with the cache."""

SINGLE = ("mask", "positions", "scored", "extent")
"""Roles of at most one input."""


def encode_cache(cache: CacheLayout | None) -> dict[str, Any] | None:
    """A layout as JSON values; None without a cache."""
    if cache is None:
        return None
    single = {role: name for role in SINGLE if (name := getattr(cache, role)) is not None}
    return {
        "tokens": cache.tokens,
        "logits": cache.logits,
        **single,
        "memories": list(cache.memories),
        **({ALIKE: True} if cache.rows_alike else {}),
        **({OWN_MASK: True} if cache.own_mask else {}),
        **({ENDS: cache.ends} if cache.ends is not None else {}),
        "slots": [
            [slot.past, slot.present, slot.axis, *([IN_PLACE] if slot.in_place else [])]
            for slot in cache.slots
        ],
    }


def decode_cache(
    data: Mapping[str, Any], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> CacheLayout | None:
    """The layout in a program's or an engine's JSON values; None if it has no cache.

    Raises BundleError for a layout that is not one of these inputs and outputs.
    """
    if KEY not in data:
        return cache_of_names(inputs, outputs)
    found = data[KEY]
    if found is None:
        return None
    try:
        layout = _layout(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"the file does not declare a valid KV cache: {error}") from error
    misfit = layout.misfit(inputs, outputs)
    if misfit:
        raise BundleError(f"the file does not declare a valid KV cache: {misfit}")
    return layout


def _layout(data: Any) -> CacheLayout:
    mask, positions, scored, extent = (_name(data[role]) if role in data else None for role in SINGLE)
    return CacheLayout(
        tokens=_name(data["tokens"]),
        logits=_name(data["logits"]),
        slots=tuple(_slot(*item) for item in data["slots"]),
        mask=mask,
        positions=positions,
        scored=scored,
        extent=extent,
        rows_alike=data.get(ALIKE) is True,
        own_mask=data.get(OWN_MASK) is True,
        ends=_name(data[ENDS]) if ENDS in data else None,
        memories=tuple(map(_name, data["memories"])),
    )


def _slot(past: Any, present: Any, axis: Any, form: Any = None) -> SlotNames:
    if type(axis) is not int:
        raise TypeError(f"{axis!r} is no axis")
    if form not in (None, IN_PLACE):
        raise ValueError(f"{form!r} is no form of a slot")
    return SlotNames(_name(past), _name(present), axis, form == IN_PLACE)


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no name")
    return value
