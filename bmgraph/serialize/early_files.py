"""What files of early versions say otherwise, or leave unsaid and is told from the names that those versions gave to inputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bmgraph.errors import BundleError
from bmgraph.ir.cache_spec import CacheLayout, SlotNames
from bmgraph.ir.input_kind import InputKind
from bmgraph.ir.tensor_spec import TensorSpec

PAST_SIZE, SCORED = "past", "scored_positions"
PAST, PRESENT, MEMORY = "past_", "present_", "memory_"
"""Prefixes of inputs that hold the cache, of outputs that return it, and of inputs that take an encoder's outputs."""


def kinds_of_names(inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The inputs of an engine that early versions saved, with the kinds that generation asks for: which ones are masks.

    A program of early versions is not told by names: its kinds are found in its dataflow when a pass or a backend takes it.
    """
    return tuple(
        spec
        if spec.kind is not None
        else replace(spec, kind=InputKind.MASK if "mask" in spec.name else InputKind.OTHER)
        for spec in inputs
    )


def cache_of_names(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> CacheLayout | None:
    """The KV cache of a signature that early versions saved; None if it has none."""
    presents = {spec.name: spec for spec in outputs if spec.name.startswith(PRESENT)}
    slots = []
    for spec in inputs:
        name = PRESENT + spec.name.removeprefix(PAST)
        if spec.name.startswith(PAST) and name in presents and PAST_SIZE in spec.shape:
            slots.append(SlotNames(spec.name, name, spec.shape.index(PAST_SIZE)))
    logits = [spec for spec in outputs if spec.name not in presents]
    pasts = {slot.past for slot in slots}
    memories = [spec.name for spec in inputs if spec.name.startswith(MEMORY)]
    rest = [spec for spec in inputs if spec.name not in pasts and spec.name not in memories]
    if not slots or not logits or not rest:
        return None
    total = presents[slots[0].present].shape[slots[0].axis : slots[0].axis + 1]
    tokens, further = rest[0], [spec for spec in rest[1:] if spec.name != SCORED]
    layout = CacheLayout(
        tokens=tokens.name,
        logits=logits[0].name,
        slots=tuple(slots),
        mask=next((spec.name for spec in further if spec.shape[1:] == total), None),
        positions=next((spec.name for spec in further if spec.shape == tokens.shape), None),
        scored=next((spec.name for spec in rest if spec.name == SCORED), None),
        memories=tuple(memories),
    )
    return None if layout.misfit(inputs, outputs) else layout


ENCODER = "encoder"
"""Key of an encoder that early versions saved as a program of its own beside the decoder, and the name of its graph."""


def with_encoder_as_graph(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """The JSON values of a program whose encoder, if early versions saved one, is one of its graphs.

    Raises BundleError where the encoder is not a program.
    """
    if ENCODER not in tree:
        return tree
    try:
        encoder = tree[ENCODER]
        joined = {key: value for key, value in tree.items() if key != ENCODER}
        for key in ("parameters", "buffers", "frozen", "packages"):
            if key in encoder or key in tree:
                joined[key] = list(dict.fromkeys([*encoder.get(key, []), *tree.get(key, [])]))
        return {
            **joined,
            "ties": {**encoder["ties"], **tree["ties"]},
            "graphs": {ENCODER: encoder["graphs"]["forward"], **tree["graphs"]},
            "signatures": {ENCODER: encoder},
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"the file does not hold a valid program: its encoder is none: {error}") from error


def early_encoder(manifest: Mapping[str, Any], files: Collection[str]) -> dict[str, tuple[str, Any]]:
    """The encoder's graph in an engine's manifest: its file and what the manifest says of it; empty without an encoder."""
    file = f"{ENCODER}.onnx"
    return {ENCODER: (file, manifest.get(ENCODER))} if file in files else {}
