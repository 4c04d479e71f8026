"""A decoder with a cache is held against the one without: token by token, in pieces, and behind padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bmgraph.errors import PassError
from bmgraph.ir.cache_spec import CacheSpec, cache_spec
from bmgraph.ir.program import Program
from bmgraph.verify.metrics import relative_error
from bmgraph.verify.reference_outputs import exact_bound
from bmgraph.verify.weight_only_check import ROUNDINGS

PADDED = 2
"""By how many positions of padding the proof shifts a prompt."""

LONGEST = 24
"""The longest prompt that a proof reads."""

SLACK = 10
"""By how much more than an exact pass a cache may move the logits: products of other shapes add in another order."""

Batch = Mapping[str, torch.Tensor]


def check_cached(whole: Program, cached: Program) -> None:
    """Raise PassError where reading a prompt in pieces gives other logits than reading it whole.

    Activations that are rounded over a whole batch are compared unrounded: a piece is scaled by its own range.
    """
    whole, cached = _unrounded(whole), _unrounded(cached)
    if cached.encoder is not None:
        cached.encoder = _unrounded(cached.encoder)
    spec = spec_of(cached)
    tokens = prompt(spec, whole.example)
    length = tokens.shape[1]
    given = {name: value for name, value in whole.example.items() if name != spec.tokens.name}
    if spec.mask is not None:
        given[spec.mask.name] = torch.ones_like(tokens).to(spec.mask.dtype)
    if spec.positions is not None:
        given[spec.positions.name] = torch.arange(length).expand_as(tokens).to(spec.positions.dtype)
    expected = whole(**{spec.tokens.name: tokens, **given})[spec.logits.name]
    for padding in (0, PADDED) if spec.mask is not None else (0,):
        reader = Reader(cached, spec, fixed(cached, spec, given))
        done = 0
        for piece in (length // 2, 1, length - length // 2 - 1):
            found = reader.read(tokens[:, done : done + piece], padding if not done else 0)
            done += piece
            moved = relative_error(found[:, -1], expected[:, done - 1])
            if not moved <= SLACK * exact_bound(whole):
                behind = f" behind {padding} positions of padding" if padding else ""
                raise PassError(
                    f"read in pieces{behind}, its logits differ by {moved:.1e} (relative): its tokens meet in more than "
                    "attention, or their positions are not those of attention's"
                )


def spec_of(program: Program) -> CacheSpec:
    """The cache of a program that has one."""
    spec = cache_spec(program.inputs, program.outputs, program.ranges)
    assert spec is not None
    return spec


def prompt(spec: CacheSpec, example: Batch) -> torch.Tensor:
    """The ids that the example holds, at least 4 and not too many."""
    most = LONGEST if spec.limit is None else min(LONGEST, spec.limit - PADDED)
    tokens = example[spec.tokens.name]
    return (tokens if tokens.shape[1] >= 4 else tokens.repeat(1, 4))[:, :most]


def halves(cached: Program, example: Batch) -> dict[str, torch.Tensor]:
    """An example for the program with a cache: the first half of the prompt is its past."""
    spec = spec_of(cached)
    tokens = prompt(spec, example)
    reader = Reader(cached, spec, fixed(cached, spec, example))
    half = tokens.shape[1] // 2
    reader.read(tokens[:, :half], 0)
    made = reader.inputs(tokens[:, half:], 0)
    return {item.name: made[item.name] for item in cached.inputs}


def fixed(cached: Program, spec: CacheSpec, batch: Batch) -> dict[str, torch.Tensor]:
    """The inputs that stay from step to step: what the encoder makes, and values of rows."""
    made = {item.name: batch[item.name] for item in spec.others}
    if cached.encoder is not None:
        made |= cached.encoder(**{item.name: batch[item.name] for item in cached.encoder.inputs})
    return made


class Reader:
    """Reads tokens through a program with a cache, from an empty one on."""

    def __init__(self, program: Program, spec: CacheSpec, fixed: Batch) -> None:
        self._program, self._spec, self._fixed = program, spec, dict(fixed)
        self._past: dict[str, torch.Tensor] = {}
        self._mask: torch.Tensor | None = None

    def inputs(self, tokens: torch.Tensor, padding: int) -> dict[str, torch.Tensor]:
        """The inputs for further tokens, with `padding` positions in front of them."""
        spec, rows = self._spec, tokens.shape[0]
        real = torch.ones_like(tokens)
        tokens = torch.nn.functional.pad(tokens, (padding, 0))
        real = torch.nn.functional.pad(real, (padding, 0))
        mask = real if self._mask is None else torch.cat([self._mask, real], 1)
        self._mask = mask
        made: dict[str, Any] = {spec.tokens.name: tokens, **self._fixed}
        if spec.mask is not None:
            made[spec.mask.name] = mask.to(spec.mask.dtype)
        if spec.positions is not None:
            places = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            made[spec.positions.name] = places.to(spec.positions.dtype)
        return {**made, **(self._past or spec.empty(rows))}

    def read(self, tokens: torch.Tensor, padding: int) -> torch.Tensor:
        """The logits [B, 1, V] after further tokens."""
        found = self._program(**self.inputs(tokens, padding))
        self._past = {slot.past.name: found[slot.present.name] for slot in self._spec.slots}
        return found[self._spec.logits.name]


def _unrounded(program: Program) -> Program:
    """The program without the rounding of activations."""
    twin = program.clone()
    for node in list(twin.graph.nodes):
        if node.target in ROUNDINGS:
            node.replace_all_uses_with(node.args[0])
            twin.graph.erase_node(node)
    return twin
