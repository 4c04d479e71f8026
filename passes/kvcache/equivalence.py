"""Compares a decoder with a KV cache to the same decoder without: in pieces, token by token, and behind padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bmgraph.errors import PassError
from bmgraph.ir.cache_spec import CacheSpec
from bmgraph.ir.omitted_inputs import outputs_of
from bmgraph.ir.program import Program
from bmgraph.verify.metrics import relative_error
from bmgraph.verify.reference_outputs import exact_bound
from bmgraph.verify.weight_only_check import unrounded

PADDING = 2
"""How many positions of padding the check puts in front of a prompt."""

MIN_PROMPT, MAX_PROMPT = 2, 24
"""The shortest and the longest prompt that the check reads, in tokens: a prompt of one has no pieces."""

TOLERANCE_FACTOR = 10
"""How much more than an exact pass a cache may change the logits: products of other shapes sum in another order."""

Batch = Mapping[str, torch.Tensor]


def check_cached(uncached: Program, cached: Program) -> None:
    """Raise PassError where reading a prompt in pieces gives other logits than reading it whole.

    Rounding of activations is removed from both: scales over a whole batch would differ between a piece and the whole.
    """
    uncached, cached = unrounded(uncached), unrounded(cached)
    spec = spec_of(cached)
    tokens = example_prompt(spec, uncached.example)
    length = tokens.shape[1]
    other_inputs = {name: value for name, value in uncached.example.items() if name != spec.tokens.name}
    if spec.mask is not None and spec.mask.name in other_inputs:
        other_inputs[spec.mask.name] = torch.ones_like(tokens).to(spec.mask.dtype)
    if spec.positions is not None:
        other_inputs[spec.positions.name] = torch.arange(length).expand_as(tokens).to(spec.positions.dtype)
    expected = uncached(**{spec.tokens.name: tokens, **other_inputs})[spec.logits.name]
    _check_plain_batch(
        cached, spec, {spec.tokens.name: tokens, **other_inputs}, expected, exact_bound(uncached)
    )
    for padding in (0, *_room_for_padding(spec, length)):
        reader = Reader(cached, spec, constant_inputs(cached, spec, other_inputs))
        done = 0
        for piece in (length // 2, 1, length - length // 2 - 1):
            if piece == 0:
                continue  # a prompt of two tokens has two pieces
            outputs = reader.read(tokens[:, done : done + piece], padding if not done else 0)
            done += piece
            error = relative_error(outputs[:, -1], expected[:, done - 1])
            if not error <= TOLERANCE_FACTOR * exact_bound(uncached):
                context = f" after {padding} positions of padding" if padding else ""
                raise PassError(
                    f"read in pieces{context}, its logits change by {error:.1e} (relative): its tokens interact outside "
                    "causal attention, or its positions are not those that the mask counts"
                )


def _check_plain_batch(
    cached: Program, spec: CacheSpec, batch: Batch, expected: torch.Tensor, bound: float
) -> None:
    """Raise PassError where a batch without a cache gives other logits, at any position, than the program without one."""
    constant = constant_inputs(cached, spec, batch)
    own = {item.name for item in cached.inputs}
    found = cached(**{name: value for name, value in batch.items() if name in own} | constant)
    error = relative_error(found[spec.logits.name], expected)
    if not error <= TOLERANCE_FACTOR * bound:
        raise PassError(
            f"read whole into an empty cache, its logits change by {error:.1e} (relative): its tokens interact outside "
            "causal attention, or its positions are not those that the mask counts"
        )


def spec_of(program: Program) -> CacheSpec:
    """The cache of a program that has one."""
    assert program.cache is not None
    return program.cache.spec(program)


def example_prompt(spec: CacheSpec, example: Batch) -> torch.Tensor:
    """The ids of the example, repeated to at least 4 tokens and cut to the longest prompt that the check reads: 2 tokens
    or more, with room for padding where the model has some left."""
    limit = MAX_PROMPT if spec.limit is None else min(MAX_PROMPT, max(spec.limit - PADDING, MIN_PROMPT))
    tokens = example[spec.tokens.name]
    return (tokens if tokens.shape[1] >= 4 else tokens.repeat(1, 4))[:, :limit]


def _room_for_padding(spec: CacheSpec, length: int) -> list[int]:
    """How many positions of padding the check puts in front of a prompt; none where the model has no room for any."""
    room = PADDING if spec.limit is None else min(PADDING, spec.limit - length)
    return [room] if spec.mask is not None and room > 0 else []


def cached_example(cached: Program, example: Batch) -> dict[str, torch.Tensor]:
    """An example for the program with a cache: the first half of the prompt is in the cache."""
    spec = spec_of(cached)
    tokens = example_prompt(spec, example)
    reader = Reader(cached, spec, constant_inputs(cached, spec, example))
    half = tokens.shape[1] // 2
    reader.read(tokens[:, :half], 0)
    inputs = reader.inputs(tokens[:, half:], 0)
    if spec.scored is not None:  # several, of which none is the last: a shorter batch has them too
        inputs[spec.scored.name] = torch.arange(max(1, tokens.shape[1] - half - 1), device=tokens.device)
    return {item.name: inputs[item.name] for item in cached.inputs}


def constant_inputs(cached: Program, spec: CacheSpec, batch: Batch) -> dict[str, torch.Tensor]:
    """The inputs that stay the same from step to step: an encoder's outputs, and inputs with one value a row."""
    return {item.name: batch[item.name] for item in spec.others} | outputs_of(cached.feeders(), batch)


class Reader:
    """Reads tokens through a program with a cache, starting from an empty cache."""

    def __init__(self, program: Program, spec: CacheSpec, constant_inputs: Batch) -> None:
        self._program, self._spec, self._constant = program, spec, dict(constant_inputs)
        self._past: dict[str, torch.Tensor] = {}
        self._mask: torch.Tensor | None = None

    def inputs(self, tokens: torch.Tensor, padding: int) -> dict[str, torch.Tensor]:
        """The inputs for the next tokens, with `padding` positions in front of them."""
        spec, rows = self._spec, tokens.shape[0]
        real = torch.ones_like(tokens)
        tokens = torch.nn.functional.pad(tokens, (padding, 0))
        real = torch.nn.functional.pad(real, (padding, 0))
        mask = real if self._mask is None else torch.cat([self._mask, real], 1)
        self._mask = mask
        inputs: dict[str, Any] = {spec.tokens.name: tokens, **self._constant}
        if spec.mask is not None:
            inputs[spec.mask.name] = mask.to(spec.mask.dtype)
        if spec.positions is not None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            inputs[spec.positions.name] = positions.to(spec.positions.dtype)
        if spec.scored is not None:
            inputs[spec.scored.name] = torch.tensor([tokens.shape[1] - 1], device=tokens.device)
        return {**inputs, **(self._past or spec.empty(rows))}

    def read(self, tokens: torch.Tensor, padding: int) -> torch.Tensor:
        """Read the next tokens; returns their last logits [B, 1, V]."""
        outputs = self._program(**self.inputs(tokens, padding))
        self._past = {slot.past.name: outputs[slot.present.name] for slot in self._spec.slots}
        return outputs[self._spec.logits.name]
