"""Prefixes in folders: PEFT's one tensor for all layers, or one pair of tensors for each attention where PEFT has no form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bmgraph.deltas.family import PREFIX
from bmgraph.deltas.file_values import check_values
from bmgraph.deltas.peft_config import SAVED, check_known
from bmgraph.errors import BundleError

EMBEDDINGS = "prompt_embeddings"
"""PEFT's tensor f[n, 2 * layers * heads * size]: for each layer its keys, then its values."""

KNOWN = frozenset(
    {"num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules", "encoder_hidden_size",
     "prefix_projection", "init_weights"}
)  # fmt: skip
"""Options of PEFT's configuration; sizes are checked against the tensor."""

ENDS = ("prefix_key", "prefix_value")

Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys f[n, H, D] and values f[n, H, E]."""


def places_in_peft(layers: int, two_stacks: bool) -> list[tuple[int, int]]:
    """Where PEFT reads the keys and values of each layer from, among the 2 * layers entries of its tensor.

    For an encoder-decoder PEFT repeats the entries, gives each layer of the decoder four of them and uses the first two. So with
    an even number of layers those of the second half read what those of the first half read, and half of the entries is not read.
    """
    if not two_stacks:
        return [(2 * layer, 2 * layer + 1) for layer in range(layers)]
    return [((4 * layer) % (2 * layers), (4 * layer + 1) % (2 * layers)) for layer in range(layers)]


def prefix_config(
    prefixes: Mapping[str, Pair], in_order: bool, task: tuple[str | None, bool]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The configuration and tensors of a folder, in PEFT's form where it has these prefixes: all attentions that get one by
    default, of equal sizes, and in an encoder-decoder equal where PEFT has one for two layers."""
    task_type, two_stacks = task
    pairs = list(prefixes.values())
    count, heads, size = pairs[0][0].shape
    config = {
        **SAVED, "task_type": task_type, "num_virtual_tokens": int(count), "token_dim": int(heads * size), "num_layers": len(pairs),
        "num_attention_heads": int(heads), "num_transformer_submodules": 2 if two_stacks else 1,
        "encoder_hidden_size": int(heads * size), "prefix_projection": False,
    }  # fmt: skip
    entries = _entries(pairs, two_stacks) if in_order else None
    if entries is not None:
        return config, {EMBEDDINGS: torch.stack(entries, 1).flatten(1).contiguous()}
    tensors = {
        f"{PREFIX}{path}.{end}": value.contiguous()
        for path, pair in prefixes.items()
        for end, value in zip(ENDS, pair)
    }
    return config, tensors


def _entries(pairs: list[Pair], two_stacks: bool) -> list[torch.Tensor] | None:
    """PEFT's entries f[n, H, D]; None where it cannot have these."""
    shape = pairs[0][0].shape
    if any(value.shape != shape for pair in pairs for value in pair):
        return None
    found: dict[int, torch.Tensor] = {}
    for places, pair in zip(places_in_peft(len(pairs), two_stacks), pairs):
        for place, value in zip(places, pair):
            if place in found and not torch.equal(found[place], value):
                return None
            found[place] = value
    return [found.get(place, torch.zeros_like(pairs[0][0])) for place in range(2 * len(pairs))]


def read_prefixes(
    path: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]
) -> tuple[dict[str, Pair], tuple[Pair, ...]]:
    """Take the keys and values out of `tensors`: by the path of their attention, or in the order of layers as PEFT has them.

    Raises BundleError for what is not valid.
    """
    check_known(path, config, KNOWN, "prefix")
    if EMBEDDINGS in tensors:
        return {}, _from_peft(path, config, tensors.pop(EMBEDDINGS))
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key in [key for key in tensors if key.startswith(PREFIX) and key.rpartition(".")[2] in ENDS]:
        place, _, end = key.removeprefix(PREFIX).rpartition(".")
        value = tensors.pop(key)
        _check(path, key, value, 3)
        found.setdefault(place, {})[end] = value
    for place, own in found.items():
        if set(own) != set(ENDS) or len(own[ENDS[0]]) != len(own[ENDS[1]]):
            raise BundleError(f"{path} has no keys and values of equal length of the prefix of {place}")
    lengths = {len(own[ENDS[0]]) for own in found.values()}
    if len(lengths) > 1:
        raise BundleError(f"{path} has prefixes of {sorted(lengths)} positions: expected one length")
    return {place: (own[ENDS[0]], own[ENDS[1]]) for place, own in found.items()}, ()


def _from_peft(path: Path, config: Mapping[str, Any], value: torch.Tensor) -> tuple[Pair, ...]:
    _check(path, EMBEDDINGS, value, 2)
    layers, width = _whole(path, config, "num_layers"), _whole(path, config, "token_dim")
    heads, count = _whole(path, config, "num_attention_heads"), _whole(path, config, "num_virtual_tokens")
    stacks = config.get("num_transformer_submodules") or 1
    if stacks not in (1, 2):
        raise BundleError(f"{path} has num_transformer_submodules={str(stacks)[:80]}: expected 1 or 2")
    if width % heads or list(value.shape) != [count, 2 * layers * width]:
        raise BundleError(
            f"{path}: {EMBEDDINGS} is {list(value.shape)}, and the configuration says {count} tokens, {layers} layers and keys of "
            f"{width} features in {heads} heads: expected [{count}, {2 * layers * width}]"
        )
    entries = value.reshape(count, 2 * layers, heads, width // heads)
    places = places_in_peft(layers, stacks == 2)
    return tuple((entries[:, key], entries[:, own]) for key, own in places)


def _whole(path: Path, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise BundleError(f"{path} has {key}={str(value)[:80]}: expected a whole number of at least 1")
    return value


def _check(path: Path, name: str, value: torch.Tensor, axes: int) -> None:
    check_values(path, name, value)
    if not value.is_floating_point() or value.dim() != axes or not value.numel():
        raise BundleError(
            f"{path}: {name} is {value.dtype} of shape {list(value.shape)}: expected numbers with {axes} axes"
        )
