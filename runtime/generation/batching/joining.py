"""What continuous batching needs of a decoder: states whose rows are put together and taken apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, Self, runtime_checkable

import numpy as np

from bmgraph.errors import InputError
from bmgraph.ir.cache_spec import CacheSpec
from bmgraph.ir.input_kind import MASKS
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.runtime.generation.batching.held_positions import HeldPositions
from bmgraph.runtime.generation.batching.row_memories import unfit_memory
from bmgraph.runtime.generation.decode_loop import Decoder, DecodeState
from bmgraph.runtime.generation.sampling import Array


class JoiningState(DecodeState, Protocol):
    """The KV cache of some rows. Their last positions stand at one place, and a shorter row has padding in front, which its mask hides;
    or, of a decoder whose rows end apart, their first ones do, and a shorter row has padding behind.

    Keys and values know their own position in the text, so they may be moved along the axis of positions.
    """

    def reserve(self, rows: int, most: int) -> None:
        """Have room for `rows` rows of `most` positions at most, as far as memory is taken ahead at all."""

    def join(self, other: Self) -> None:
        """Take the rows of another state behind those that are there; whichever is shorter is padded."""

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Let only these rows go on, in this order."""

    def forget_front(self, count: int) -> None:
        """Take the first `count` positions, padding in all rows, from the cache."""

    def forget(self, count: int) -> None:
        """Take the last `count` positions, padding in all rows, from the cache of rows that end apart."""

    def positions(self, row: int, begin: int, end: int) -> HeldPositions:
        """A copy of what the cache holds of a row from one position to another; those of padding in front count."""

    def begin_with(self, parts: Sequence[HeldPositions]) -> None:
        """Let an empty cache of one row hold these positions, one part behind the other."""


@runtime_checkable
class JoiningDecoder(Decoder, Protocol):
    """A decoder whose states can be put together."""

    @property
    def no_joining(self) -> str:
        """Why they cannot, for this model; empty if they can."""

    def for_batching(self, wide: bool) -> JoiningDecoder:
        """This decoder; `wide` lets its steps of many tokens run on another form of the model, where there is one (`Batching`)."""

    @property
    def wide_form(self) -> object | None:
        """What steps of many tokens run on, whose text says so; None where all steps run alike."""

    @property
    def copies_all_rows(self) -> bool:
        """Whether a copy of positions of one row costs as much as one of all rows: those of rows that leave a batch are then not kept."""

    @property
    def longest_encoded(self) -> int | None:
        """How many positions its encoder takes; None without a bound, or an encoder."""

    @property
    def encoded_in(self) -> int:
        """Of what multiple the number of positions is that prompts are encoded in, as far as its encoder has room; 1 for any."""

    @property
    def rows_end_apart(self) -> bool:
        """Whether rows that are joined begin at the first position and end where they end; each step is told where (`step_feeds`)."""

    def start(self, batch_size: int, encoder_feeds: Mapping[str, Array], most: int) -> JoiningState:
        """An empty cache, as `Decoder.start` gives it."""


def row_mask(lengths: Array, total: int, apart: bool) -> Array:
    """The mask i64[B, T] of rows of `lengths` i64[B] among `total` positions: they begin at the first one where rows end `apart`, else
    they end at the last one."""
    places = np.arange(total) - (0 if apart else total - lengths[:, None])
    found: Array = ((places >= 0) & (places < lengths[:, None])).astype(np.int64)
    return found


def joining(decoder: Decoder) -> JoiningDecoder:
    """The decoder, for continuous batching. Raises InputError, saying why, where it cannot be had."""
    if not isinstance(decoder, JoiningDecoder):
        raise InputError(
            "submit: requests cannot join a batch on this backend, which keeps the cache itself: compile for ONNX Runtime, as in "
            "Onnx(generate=True), for OpenVINO or for torch"
        )
    if decoder.no_joining:
        raise InputError(f"submit: requests cannot join a batch here: {decoder.no_joining}; use generate")
    return decoder


def unfit_for_joining(cache: CacheSpec, encoder_inputs: Sequence[TensorSpec]) -> str:
    """Why rows over this cache cannot be put together; empty if they can. `encoder_inputs` are those of what gives its memories."""
    unfit = (unfit_memory(spec, cache.tokens.shape[0]) for spec in cache.memories)
    found = next(filter(None, unfit), "")
    if found:
        return found
    if cache.memories and not any(spec.kind in MASKS for spec in encoder_inputs):
        return "its encoder takes no mask that could hide the padding behind shorter prompts"
    if cache.mask is None and cache.memories:
        return (
            "its decoder has no mask that could hide the padding in front of shorter rows (engines of earlier versions have none: compile "
            "them anew)"
        )
    if cache.mask is None:
        return "this model takes no mask that could hide the padding in front of shorter rows"
    fixed = next((slot for slot in cache.slots if isinstance(slot.past.shape[slot.axis], int)), None)
    return "" if fixed is None else f"its cache {fixed.past} has a fixed number of positions"


def check_encoded(decoder: JoiningDecoder, prompt: Sequence[int]) -> None:
    """Raise InputError for a prompt that is longer than what the decoder's encoder takes."""
    longest = decoder.longest_encoded
    if longest is not None and len(prompt) > longest:
        raise InputError(
            f"prompt 0 has {len(prompt)} tokens, more than the {longest} that this model's encoder takes: shorten it"
        )
