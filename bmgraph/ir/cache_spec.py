"""The KV cache of a decoder: which inputs and outputs of a program or an engine it is made of, as declared by who made it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import torch

from bmgraph.ir.tensor_spec import Range, TensorSpec

FLOAT, INT8 = "float", "int8"
"""What an engine keeps its cache in: what it computes in, or codes of 8 bits."""


class Signature(Protocol):
    """A program or an engine, as far as its cache is concerned."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Its input specs."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Its output specs."""

    @property
    def ranges(self) -> Mapping[str, Range]:
        """The ranges of its dynamic sizes."""


@dataclass(frozen=True)
class SlotNames:
    """One tensor of the cache: the input that holds it, the output that returns it, and its axis of positions.

    `in_place`: the input may have room for more positions than it holds, and an output in the same memory appends without copying;
    how many positions it holds is then said by the size of the mask, or of `CacheLayout.extent`.
    """

    past: str
    present: str
    axis: int
    in_place: bool = False


@dataclass(frozen=True)
class CacheLayout:
    """The names of the inputs and outputs of a decoder with a KV cache, by role; see `CacheSpec` for what they hold.

    What an attention keeps may be several slots (codes and scales). The size of a slot at its axis is dynamic if the cache
    grows with the text, a number if it has a fixed size. `rows_alike`: rows run together only if their masks and positions are
    equal, or each has one new position. `ends`: an input that no caller gives, see `CacheSpec`. `own_mask`: the mask came with the cache,
    and the model has none: a batch may leave it out, and then hides nothing.
    """

    tokens: str
    logits: str
    slots: tuple[SlotNames, ...]
    mask: str | None = None
    positions: str | None = None
    scored: str | None = None
    memories: tuple[str, ...] = ()
    extent: str | None = None
    rows_alike: bool = False
    ends: str | None = None
    own_mask: bool = False

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs that have a role."""
        single = (self.tokens, self.mask, self.positions, self.scored, self.extent)
        named = (name for name in single if name is not None)
        return (*named, *self.memories, *(slot.past for slot in self.slots))

    def without_unused(self, inputs: Sequence[TensorSpec]) -> CacheLayout:
        """The layout of a program that has these inputs left: it may not need a mask or positions, for example."""
        left = {spec.name for spec in inputs}
        return replace(
            self,
            mask=self.mask if self.mask in left else None,
            own_mask=self.own_mask and self.mask in left,
            positions=self.positions if self.positions in left else None,
            scored=self.scored if self.scored in left else None,
            extent=self.extent if self.extent in left else None,
            memories=tuple(name for name in self.memories if name in left),
        )

    def with_in_place(
        self, found: Collection[tuple[str, str]], rows_alike: bool, ends: str | None = None
    ) -> CacheLayout:
        """The layout in which the slots that are `found`, as (past, present), are appended in place."""
        slots = (replace(slot, in_place=(slot.past, slot.present) in found) for slot in self.slots)
        return replace(self, slots=tuple(slots), rows_alike=rows_alike, ends=ends)

    def misfit(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> str:
        """Why the layout is not one of these inputs and outputs; empty if it is."""
        taken, given = {spec.name: spec for spec in inputs}, {spec.name: spec for spec in outputs}
        returned = (self.logits, *(slot.present for slot in self.slots))
        for names, known, what in ((self.input_names, taken, "input"), (returned, given, "output")):
            for name in names:
                if name not in known:
                    return f"its cache names the {what} {name!r}, which is not there"
                if names.count(name) > 1:
                    return f"its cache names the {what} {name!r} twice"
        if not self.slots:
            return "its cache has no slots"
        ranks = ((self.tokens, 2), (self.mask, 2), (self.positions, 2), (self.scored, 1), (self.extent, 2))
        for role, rank in ranks:
            if role is not None and (len(taken[role].shape) != rank or taken[role].dtype.is_complex):
                return f"its cache names the input {taken[role]}: expected one of {rank} dimensions"
        shape = given[self.logits].shape
        if taken[self.tokens].dtype.is_floating_point or len(shape) != 3 or not isinstance(shape[-1], int):
            return f"its cache reads {taken[self.tokens]} as ids and {given[self.logits]} as logits [batch, sequence, ids]"
        for slot in self.slots:
            past, present = taken[slot.past], given[slot.present]
            if past.dtype != present.dtype or not 0 < slot.axis < len(past.shape) == len(present.shape):
                return f"its cache appends to {past} at axis {slot.axis} and returns {present}"
            if slot.in_place and self.mask is None and self.extent is None:
                return f"its cache appends to {past} in place, and no input says how many positions it holds"
        if self.ends is not None and (self.ends in taken or not all(slot.in_place for slot in self.slots)):
            return f"its cache ends rows by the input {self.ends!r}, which callers give, or does not append in place"
        return ""

    def spec(self, signature: Signature) -> CacheSpec:
        """The layout with the specs of a signature that it fits."""
        taken = {spec.name: spec for spec in signature.inputs}
        given = {spec.name: spec for spec in signature.outputs}
        slots = tuple(
            Slot(taken[slot.past], given[slot.present], slot.axis, slot.in_place) for slot in self.slots
        )
        total = slots[0].present.shape[slots[0].axis]
        limit = total if isinstance(total, int) else signature.ranges.get(total, Range()).high
        named = set(self.input_names)
        return CacheSpec(
            tokens=taken[self.tokens],
            mask=taken[self.mask] if self.mask is not None else None,
            positions=taken[self.positions] if self.positions is not None else None,
            logits=given[self.logits],
            slots=slots,
            memories=tuple(taken[name] for name in self.memories),
            others=tuple(spec for spec in signature.inputs if spec.name not in named),
            limit=limit,
            scored=taken[self.scored] if self.scored is not None else None,
            extent=taken[self.extent] if self.extent is not None else None,
            rows_alike=self.rows_alike,
            ends=self.ends,
        )


@dataclass(frozen=True)
class Slot:
    """One tensor of the KV cache: the input that holds it, the output that returns it with the new positions appended,
    its axis of positions, and whether it may be appended in place (see `SlotNames`)."""

    past: TensorSpec
    present: TensorSpec
    axis: int
    in_place: bool = False

    def empty_shape(self, rows: int, room: int = 0) -> list[int]:
        """Its sizes for `rows` rows, the first axis, without cached positions; with room for some if it is appended in place."""
        shape = [dim if isinstance(dim, int) else 0 for dim in self.past.shape]
        if self.in_place:
            shape[self.axis] = room
        return [rows, *shape[1:]]


@dataclass(frozen=True)
class CacheSpec:
    """The signature of a decoder with a KV cache: B rows, P cached positions, S new positions, V ids, K positions to score.

    - tokens i64[B, S]: ids of the new positions, S >= 1.
    - mask [B, P + S]: 0 hides a position from all that follow; None if the model takes no mask.
    - positions i64[B, S]: position numbers; None if the model computes them itself.
    - extent [1, P + S]: only its size is read; None if the mask, or the size of the cache, says how many positions there are.
    - scored i64[K]: which of the S new positions to compute logits of; None if the logits are those of the last one.
    - logits f[B, K, V]: of the positions in `scored`.
    - slots: the tensors of the cache.
    - memories: outputs of an encoder, the same at every step.
    - others: inputs of one value per row, such as the delta to use.
    - limit: the largest P + S; None if there is no bound.
    - ends: the name of an input i32[B] that the engine gives itself: where each row's one new position stands in the cache, with the
      row's others before it and padding behind; i32[1] of -1 where all new positions are the last ones, behind any padding. None if the
      engine does not have it.
    """

    tokens: TensorSpec
    mask: TensorSpec | None
    positions: TensorSpec | None
    logits: TensorSpec
    slots: tuple[Slot, ...]
    memories: tuple[TensorSpec, ...]
    others: tuple[TensorSpec, ...]
    limit: int | None
    scored: TensorSpec | None = None
    extent: TensorSpec | None = None
    rows_alike: bool = False
    ends: str | None = None

    @property
    def given(self) -> tuple[TensorSpec, ...]:
        """The inputs that a step of a generation gives."""
        single = (self.tokens, self.mask, self.positions, self.extent, self.scored)
        return (*(spec for spec in single if spec is not None), *self.others)

    @property
    def vocabulary(self) -> int:
        """The number of ids V: those that the decoder can read."""
        return id_count(self.tokens, int(self.logits.shape[-1]))

    @property
    def soft_tokens(self) -> int:
        """The number of trained tokens, whose ids are -1, -2, ...."""
        return 0 if self.tokens.values is None else max(0, -self.tokens.values[0])

    @property
    def bytes_of_position(self) -> int:
        """The bytes that one position of one row takes."""
        return sum(
            slot.past.dtype.itemsize
            * prod(int(dim) for axis, dim in enumerate(slot.past.shape) if axis not in (0, slot.axis))
            for slot in self.slots
        )

    @property
    def sized(self) -> frozenset[str]:
        """The inputs whose size says how many positions there are."""
        return frozenset(spec.name for spec in (self.mask, self.extent) if spec is not None)

    def sizes_of_step(self, rows: int, held: int) -> dict[str, int]:
        """The dynamic sizes of a step for one new position of each row, by name, behind `held` cached ones; but those of memories."""
        sizes = {str(self.tokens.shape[0]): rows, str(self.tokens.shape[1]): 1}
        sizes |= {str(slot.past.shape[slot.axis]): held for slot in self.slots}
        if self.scored is not None:
            sizes[str(self.scored.shape[0])] = 1
        return sizes

    def bytes_of_memories(self, positions: int) -> int:
        """The bytes that one row's memories of so many positions take."""
        return sum(
            spec.dtype.itemsize * prod(dim if isinstance(dim, int) else positions for dim in spec.shape[1:])
            for spec in self.memories
        )

    def empty(self, rows: int) -> dict[str, torch.Tensor]:
        """The cache inputs for a batch of `rows` rows without cached positions (P = 0)."""
        return {
            slot.past.name: torch.zeros(slot.empty_shape(rows), dtype=slot.past.dtype) for slot in self.slots
        }


def id_count(spec: TensorSpec, otherwise: int) -> int:
    """The number of ids that an input of ids takes: the rows of its table, if they are known."""
    return otherwise if spec.values is None or spec.values[1] is None else spec.values[1] + 1
