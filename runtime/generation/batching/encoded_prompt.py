"""Reading the prompt of one request by an encoder, whose outputs the rows of a decoder then read at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bmgraph.runtime.generation.batching.joining import JoiningDecoder, JoiningState
from bmgraph.runtime.generation.batching.request import Request
from bmgraph.runtime.generation.batching.row_memories import PADDED
from bmgraph.runtime.generation.decode_loop import encoder_feeds, step_feeds
from bmgraph.runtime.generation.sampling import Array


class EncodedPrompt:
    """A request whose prompt, `ids`, an encoder reads, whole and once; `state` is then the cache of its decoder, `read` how many tokens
    are in it."""

    state: JoiningState
    again = False

    def __init__(self, decoder: JoiningDecoder, request: Request) -> None:
        self.request, self.ids, self.read = request, request.prompt, 0
        self._decoder = decoder

    @property
    def left(self) -> int:
        """How many tokens of the prompt are still to be read."""
        return 0 if self.read else len(self.ids)

    def step(self, most: int) -> Array:
        """Read the prompt, which cannot be read in pieces; the logits f[V] after the id that the decoder starts with."""
        request, decoder = self.request, self._decoder
        self.state, logits = started(
            decoder, self.ids, request.row_inputs, request.start, request.pad, request.most
        )
        self.read = 1
        return logits


def started(
    decoder: JoiningDecoder,
    prompt: list[int],
    row_inputs: Mapping[str, Array],
    start: int,
    pad_id: int,
    most: int,
    padded: bool = True,
) -> tuple[JoiningState, Array]:
    """A state of one row of at most `most` positions, which has read the id `start`, and the logits f[V] after it. Its prompt was
    encoded with padding behind it, unless it is not to be `padded`."""
    behind = encoded_positions(decoder, prompt) - len(prompt) if padded else 0
    feeds = encoder_feeds(decoder.encoder_inputs, [prompt], row_inputs, pad_id, behind)
    state = decoder.start(1, feeds, most)
    first = np.array([[start]], np.int64)
    own = decoder_inputs(decoder, row_inputs)
    logits: Array = state.step(step_feeds(decoder.cache, first, np.ones_like(first), own, [0]))[0]
    return state, logits


def encoded_positions(decoder: JoiningDecoder, prompt: Sequence[int]) -> int:
    """The positions that a prompt is encoded in, with padding behind it as far as the encoder has room; 0 without an encoder."""
    if not decoder.encoder_inputs:
        return 0
    wanted, longest = len(prompt) + PADDED, decoder.longest_encoded
    wanted = -(-wanted // decoder.encoded_in) * decoder.encoded_in
    return wanted if longest is None else max(len(prompt), min(wanted, longest))


def decoder_inputs(decoder: JoiningDecoder, row_inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The inputs of one value per row that the decoder itself takes; others are for its encoder."""
    taken = {spec.name for spec in decoder.cache.others}
    return {name: value for name, value in row_inputs.items() if name in taken}
