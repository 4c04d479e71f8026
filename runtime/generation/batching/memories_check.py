"""Whether a row whose encoder outputs are padded behind says what it says alone: seen, not assumed.

A decoder that reads what stands at padding, or an encoder whose outputs depend on how much padding there is, would not.
"""

from __future__ import annotations

import numpy as np

from bmgraph.errors import InputError
from bmgraph.ir.cache_spec import id_count
from bmgraph.ir.input_kind import MASKS
from bmgraph.runtime.generation.batching.encoded_prompt import decoder_inputs, started
from bmgraph.runtime.generation.batching.joining import JoiningDecoder
from bmgraph.runtime.generation.decode_loop import step_feeds
from bmgraph.runtime.generation.row_values import no_values
from bmgraph.runtime.generation.sampling import Array

SHORT, LONG = 2, 9
"""How many ids two prompts have that are tried."""

FAR = 0.1
"""By how much, relative, logits may differ: rounding of activations over a whole batch, which quantised products may do, is below."""


def check_memories(decoder: JoiningDecoder) -> None:
    """Raise InputError where a short prompt beside a longer one has other logits than alone."""
    longest = LONG if decoder.longest_encoded is None else min(LONG, decoder.longest_encoded)
    if longest <= SHORT:
        return
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, _vocabulary(decoder), count).tolist() for count in (SHORT, longest)]
    alone, beside = (_second(decoder, given) for given in (prompts[:1], prompts))
    if not np.linalg.norm(alone - beside) <= FAR * np.linalg.norm(alone - alone.mean()):
        raise InputError(
            "submit: requests cannot join a batch here: what this model says of a short prompt depends on the padding behind it; "
            "use generate"
        )


def _second(decoder: JoiningDecoder, prompts: list[list[int]]) -> Array:
    """The logits f[V] of the first of some prompts after two ids, the second of which is read beside the others."""
    rows = no_values((*decoder.cache.others, *decoder.encoder_inputs), 1)
    padded = len(prompts) > 1
    states = [started(decoder, prompt, rows, 0, 0, 4, padded)[0] for prompt in prompts]
    states[0].reserve(len(prompts), 4)
    for other in states[1:]:
        states[0].join(other)
    tokens = np.zeros((len(prompts), 1), np.int64)
    own = {name: value.repeat(len(prompts), 0) for name, value in decoder_inputs(decoder, rows).items()}
    mask = np.ones((len(prompts), 2), np.int64)
    found: Array = states[0].step(step_feeds(decoder.cache, tokens, mask, own, [0]))[0]
    return found.astype(np.float64)


def _vocabulary(decoder: JoiningDecoder) -> int:
    """The number of ids that both the encoder and the decoder read."""
    own = decoder.cache.vocabulary
    return min(
        [
            own,
            *(
                id_count(spec, own)
                for spec in decoder.encoder_inputs
                if len(spec.shape) == 2 and spec.kind not in MASKS
            ),
        ]
    )
