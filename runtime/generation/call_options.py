"""What a call of `generate` or `submit` asks for: its prompts, its options, how many tokens, and the ids that it starts and fills up with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from bmgraph.errors import InputError
from bmgraph.ir.generation_defaults import GenerationDefaults
from bmgraph.ir.given_tensor import as_tensor
from bmgraph.runtime.generation.beam_search import BeamSearch
from bmgraph.runtime.generation.decode_loop import Decoder, check_ids
from bmgraph.runtime.generation.option_checks import shown, whole_number
from bmgraph.runtime.generation.row_values import row_values
from bmgraph.runtime.generation.sampling import Array, Sampling
from bmgraph.utils.did_you_mean import did_you_mean

_SAMPLING_OPTIONS = tuple(field.name for field in fields(Sampling))

NEW_TOKENS = 64
"""How many tokens `generate` produces at most if nobody says."""

BOUND = ("choices", "json")
"""Options that bind what may be written, each step anew."""

GENERATE_OPTIONS = (
    "max_new_tokens", "stream", "stop", "eos", "start", "n", "speculate", "num_beams", "length_penalty", "early_stopping",
    "logprobs", "window", "keep", *BOUND,
)  # fmt: skip
SUBMIT_OPTIONS = (
    "max_new_tokens", "stop", "eos", "start", "logprobs", "answer", "window", "keep", *BOUND,
)  # fmt: skip


def answers_each(n: int, options: dict[str, Any], search: BeamSearch) -> int:
    """How many answers each prompt gets. Raises InputError for several that would all be the likeliest, for more than there are beams,
    and for beams that would be sampled."""
    count = whole_number("n", n)
    if count < 1:
        raise InputError(f"n={shown(n)}: give a whole number of 1 or more")
    if search.num_beams > 1:
        if options.get("temperature", 0) != 0:
            raise InputError(
                f"num_beams={search.num_beams} with a temperature: a beam search does not sample; leave one of them out"
            )
        if count > search.num_beams:
            raise InputError(f"n={count} of num_beams={search.num_beams}: give as many beams or more")
        return count
    if count > 1 and options.get("temperature", 0) == 0:
        raise InputError(f"n={count} answers would all be the likeliest: give a temperature above 0")
    return count


def as_list(prompts: Any) -> tuple[list[Any], bool]:
    """The prompts as a list, and whether a single one was given."""
    if isinstance(prompts, str):
        return [prompts], True
    if isinstance(prompts, (torch.Tensor, np.ndarray)):
        given = as_tensor("the array of prompts", prompts, "ids [S] or [B, S]")
        if given.dim() not in (1, 2):
            raise InputError(f"the prompts have shape {list(given.shape)}: give ids [S], or [B, S]")
        return ([given], True) if given.dim() == 1 else (list(given), False)
    if not isinstance(prompts, Sequence):
        raise InputError(f"the prompts are a {type(prompts).__name__}: give a text, ids, or a list of them")
    if prompts and all(isinstance(item, (str, Sequence, torch.Tensor, np.ndarray)) for item in prompts):
        return list(prompts), False
    return [prompts], True


def start_id(decoder: Decoder, start: int | None, defaults: GenerationDefaults) -> int | None:
    """The id that a decoder with an encoder starts with; None without an encoder. Raises InputError if it is not known."""
    if decoder.encoder_inputs and start is None:
        start = defaults.start
    if decoder.encoder_inputs and start is None:
        raise InputError(
            "this model has an encoder and a decoder, and no generation config that says what its decoder starts with: "
            "give that id, as in start=0"
        )
    if start is not None and not decoder.encoder_inputs:
        raise InputError(
            "start is for encoder-decoder models: this model has no encoder and continues the prompts themselves"
        )
    if start is not None:
        start = whole_number("start", start)
        check_ids([start], decoder.cache.vocabulary, 0)
    return start


def token_count(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    given: int | None,
    defaults: GenerationDefaults,
    slides: bool = False,
) -> int:
    """How many tokens to produce at most; a number that no caller gave fits into the positions of the model, unless their window
    `slides`.

    Raises InputError where the longest prompt leaves none of the length that the model's config allows.
    """
    if given is not None:
        return whole_number("max_new_tokens", given)
    count, limit = _default_count(decoder, prompts, defaults), decoder.cache.limit
    if limit is None or slides:
        return count
    taken = 0 if decoder.encoder_inputs else max(map(len, prompts), default=0)
    return max(min(count, limit - taken), 1)  # a prompt that leaves no position is refused with its number


def _default_count(decoder: Decoder, prompts: Sequence[Sequence[int]], defaults: GenerationDefaults) -> int:
    """How many tokens the model's generation config asks for, or 64. Raises what `token_count` raises."""
    if defaults.max_new_tokens:
        return defaults.max_new_tokens
    if not defaults.max_length:
        return NEW_TOKENS
    taken = 1 if decoder.encoder_inputs else max(map(len, prompts), default=0)
    if taken >= defaults.max_length:
        raise InputError(
            f"the longest prompt has {taken} tokens, and the model's generation config allows {defaults.max_length} with "
            "the prompt: give max_new_tokens"
        )
    return defaults.max_length - taken


def pad_id(decoder: Decoder, defaults: GenerationDefaults) -> int:
    """The id in the place of padding: the config's, if it is in the vocabulary, else 0."""
    return defaults.pad if defaults.pad is not None and defaults.pad < decoder.cache.vocabulary else 0


def split_options(
    decoder: Decoder, options: dict[str, Any], rows: int, call: str, others: Sequence[str]
) -> tuple[Sampling, dict[str, Array]]:
    """Split the options of a call into those of sampling and the program's inputs with one value per row; `others` are those that it has
    beside."""
    specs = {
        spec.name: spec for spec in (*decoder.cache.others, *decoder.encoder_inputs) if len(spec.shape) == 1
    }
    specs |= {spec.name: spec for spec in decoder.cache.others}
    known = (*_SAMPLING_OPTIONS, *specs, *others)
    for name in options:
        if name not in (*_SAMPLING_OPTIONS, *BOUND, *specs):
            hint = did_you_mean(name, known)
            raise InputError(f"{call} has no option {name!r}{hint} (options: {', '.join(known)})")
    values = {name: row_values(spec, options.get(name), rows) for name, spec in specs.items()}
    sampling = Sampling(**{name: value for name, value in options.items() if name in _SAMPLING_OPTIONS})
    return sampling, values
