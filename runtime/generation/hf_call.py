"""`engine.generate(input_ids=...)`: the options and the tensors of Hugging Face's `generate`, as those that engines have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bmgraph.errors import InputError
from bmgraph.ir.generation_defaults import CHANGES_NOTHING, GenerationDefaults
from bmgraph.ir.given_tensor import as_tensor
from bmgraph.runtime.generation.decode_loop import Decoder, Loop
from bmgraph.runtime.generation.detokenizer import TextStream
from bmgraph.runtime.generation.option_checks import shown, whole_number
from bmgraph.runtime.generation.tokenizer import Tokenizer, tokenizer_of

NEW_TOKENS = 20
"""How many tokens Hugging Face's `generate` produces where neither a call nor the model's config says."""

RENAMED = {"eos_token_id": "eos", "decoder_start_token_id": "start", "prompt_lookup_num_tokens": "speculate"}
"""Option -> what engines call it."""

SAME = (
    "repetition_penalty", "no_repeat_ngram_size", "num_beams", "length_penalty", "early_stopping",
)  # fmt: skip
"""Options that mean the same."""

DRAWN: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
"""Options of sampling, which count with do_sample=True alone, and what they are there by default."""

READ_HERE = (
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "do_sample", "num_return_sequences", "pad_token_id",
    "bad_words_ids", "suppress_tokens", "stop_strings", "tokenizer", *RENAMED, *SAME, *DRAWN,
)  # fmt: skip
"""Options of Hugging Face's `generate` that are read here; what is neither one of these nor one without a counterpart is an
input of the model."""

NO_COUNTERPART: dict[str, tuple[Any, ...]] = {
    **{name: values for name, values in CHANGES_NOTHING.items() if name not in READ_HERE},
    **dict.fromkeys(
        ("inputs", "inputs_embeds", "decoder_input_ids", "decoder_attention_mask", "encoder_outputs", "past_key_values",
         "position_ids", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "assistant_model", "streamer",
         "negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate", "generation_config", "max_time", "cache_implementation",
         "cache_config", "max_cache_len", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff",
         "exponential_decay_length_penalty", "watermarking_config", "dola_layers", "constraints", "force_words_ids",
         "prefill_chunk_size", "compile_config", "continuous_batching_config", "max_matching_ngram_size"),
        (None,),
    ),
    **dict.fromkeys(
        ("synced_gpus", "output_attentions", "output_hidden_states", "output_scores", "output_logits", "low_memory",
         "return_dict_in_generate", "renormalize_logits", "remove_invalid_values", "token_healing", "use_mtp"),
        (None, False),
    ),
    "use_cache": (None, True),
    "diversity_penalty": (None, 0.0),
}  # fmt: skip
"""Option that engines do not have -> values with which it changes nothing."""


@dataclass(frozen=True)
class TensorCall:
    """A call in the form of Hugging Face's `generate`: B rows of S ids.

    prompts: the ids of each row, without padding. options: as the engine takes them. front: i64[B, S], what stands in front of each
    result of a decoder. pad: the id behind a row that ended; None where the id that ended it stands there.
    """

    prompts: list[list[int]]
    options: dict[str, Any]
    front: torch.Tensor
    device: torch.device
    pad: int | None
    stops: tuple[str, ...]
    tokenizer: Tokenizer | None

    def result(self, rows: Sequence[Sequence[int]], each: int, start: int | None) -> torch.Tensor:
        """What the call returns, i64[B * each, S + new], from the new ids of each row, `each` for a prompt; with a `start`, behind
        that of an encoder-decoder alone."""
        width = max(map(len, rows), default=0)
        front = self.front if start is None else torch.full((len(self.prompts), 1), start)
        filled = [[*row, *[self._fill(row)] * (width - len(row))] for row in rows]
        new = torch.tensor(filled, dtype=torch.int64).reshape(len(rows), width)
        return torch.cat([front.repeat_interleave(each, 0), new], 1).to(self.device)

    def _fill(self, row: Sequence[int]) -> int:
        return self.pad if self.pad is not None else int(row[-1]) if row else 0


def tensor_call(
    decoder: Decoder,
    input_ids: Any,
    given: Mapping[str, Any],
    defaults: GenerationDefaults,
    eos: Sequence[int],
) -> TensorCall:
    """Read a call; `eos` are the ids that end texts where it does not say.

    Raises InputError, naming it, for an option that engines have no counterpart of, and for padding that is not where it belongs.
    """
    _check_counterparts(given)
    ids = _ids("input_ids", input_ids)
    asked = {name: value for name, value in given.items() if name in READ_HERE and value is not None}
    pad = asked.get("pad_token_id", defaults.pad)
    pad = None if pad is None else whole_number("pad_token_id", pad)
    ends = tuple(np.atleast_1d(np.asarray(asked.get("eos_token_id", eos))).tolist())
    mask = _mask(given.get("attention_mask"), ids, pad, ends)
    encodes = bool(decoder.encoder_inputs)
    _check_padding(mask, behind=encodes)
    prompts = [row[kept].tolist() for row, kept in zip(ids, mask)]
    options = {name: value for name, value in given.items() if name not in (*READ_HERE, *NO_COUNTERPART)}
    options.pop("attention_mask", None)
    options |= {name: asked[name] for name in SAME if name in asked}
    options |= {ours: asked[name] for name, ours in RENAMED.items() if name in asked}
    options |= _drawn(asked)
    taken = 1 if encodes else ids.shape[1]
    options |= _lengths(asked, taken)
    if "max_new_tokens" not in options:
        held = 0 if encodes else max(map(len, prompts), default=0)
        limit = None if given.get("window") else decoder.cache.limit
        options["max_new_tokens"] = _default_count(defaults, taken, held, limit)
    options |= _forbidden(asked, ends)
    stops = asked.get("stop_strings", ())
    return TensorCall(
        prompts=prompts,
        options=options,
        front=ids,
        device=getattr(input_ids, "device", torch.device("cpu")),
        pad=ends[0] if pad is None and ends else pad,
        stops=(stops,) if isinstance(stops, str) else tuple(stops),
        tokenizer=tokenizer_of(asked["tokenizer"]) if "tokenizer" in asked else None,
    )


ABSENT: dict[str, Any] = {
    "prompts": None, "stream": False, "stop": (), "eos": None, "start": None, "n": 1, "speculate": False, "logprobs": None,
}  # fmt: skip
"""What calls in the other form take -> that it was not given."""


def check_absent(**given: Any) -> None:
    """Raise InputError for what belongs to calls in the other form, beside input_ids."""
    for name, value in given.items():
        if value is not ABSENT[name] and not (type(value) is type(ABSENT[name]) and value == ABSENT[name]):
            raise InputError(
                f"{name}={shown(value)} with input_ids, which takes the options of Hugging Face's generate: give prompts for it, or "
                "what it is called there"
            )


def new_ids(loop: Loop, tokenizer: Tokenizer | None, stops: Sequence[str]) -> list[list[int]]:
    """Run a loop; the new ids of each row, with the one that ends it, and those of a stop string."""
    rows: list[list[int]] = [[] for _ in loop.done]
    streams = [TextStream(tokenizer, stops) for _ in rows] if tokenizer is not None and stops else []
    going = ~loop.done
    for picked in loop:
        for row in np.flatnonzero(going):
            rows[row].append(int(picked[row]))
            if streams:
                streams[row].push(int(picked[row]))
                loop.done[row] |= streams[row].ended
        going = ~loop.done
    return rows


def _check_counterparts(given: Mapping[str, Any]) -> None:
    if given.get("generation_config") is not None:
        raise InputError("generation_config: give what it holds as options, such as max_new_tokens=20")
    for name, value in given.items():
        if name in NO_COUNTERPART and not any(
            value is item or (type(value) is type(item) and value == item) for item in NO_COUNTERPART[name]
        ):
            raise InputError(
                f"{name}={shown(value)}: engines have no counterpart of this option of Hugging Face's generate: leave it out, "
                "or generate with the model itself"
            )


def _ids(name: str, given: Any) -> torch.Tensor:
    """i64[B, S] on the CPU."""
    found = as_tensor(name, given, "of ids [B, S]")
    if found.dim() != 2 or found.dtype.is_floating_point or found.dtype.is_complex:
        raise InputError(f"{name} has shape {list(found.shape)} and dtype {found.dtype}: give ids [B, S]")
    return found.detach().cpu().to(torch.int64)


def _mask(given: Any, ids: torch.Tensor, pad: int | None, ends: Sequence[int]) -> torch.Tensor:
    """bool[B, S], False at padding; where no mask is given, at the padding id, unless that may be an end."""
    if given is None:
        if pad is None or pad in ends:
            return torch.ones_like(ids, dtype=torch.bool)
        return ids.ne(pad)
    found = as_tensor("attention_mask", given, "of 0 and 1, [B, S]").detach().cpu()
    if found.shape != ids.shape or not bool(((found == 0) | (found == 1)).all()):
        raise InputError(
            f"attention_mask has shape {list(found.shape)}: give 0 and 1 in the shape of input_ids, {list(ids.shape)}"
        )
    return found.bool()


def _check_padding(mask: torch.Tensor, behind: bool) -> None:
    """Raise InputError for a row whose padding is not in front of its ids, or `behind` them."""
    flags = mask.flip(1) if behind else mask
    for row in range(len(mask)):
        if bool((flags[row, :-1] & ~flags[row, 1:]).any()):
            where, side = ("behind", "right") if behind else ("in front of", "left")
            raise InputError(
                f"row {row} of attention_mask has zeros that are not {where} its ids: pad there, as a tokenizer with "
                f"padding_side={side!r} does"
            )


def _drawn(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Options of sampling, and the number of results for a prompt."""
    drawn = asked.get("do_sample", False)
    if not isinstance(drawn, bool):
        raise InputError(f"do_sample={shown(drawn)}: give True or False")
    count = whole_number("num_return_sequences", asked.get("num_return_sequences", 1))
    if count > 1 and not drawn and asked.get("num_beams", 1) == 1:
        raise InputError(
            f"num_return_sequences={count} would all be the likeliest: give do_sample=True, or as many beams or more"
        )
    found: dict[str, Any] = {"n": count}
    return found | {name: asked.get(name, value) for name, value in DRAWN.items()} if drawn else found


def _lengths(asked: Mapping[str, Any], taken: int) -> dict[str, Any]:
    """How many tokens to produce, at most and at least; lengths count the `taken` positions in front of them."""
    found: dict[str, Any] = {}
    if "max_new_tokens" in asked:
        found["max_new_tokens"] = asked["max_new_tokens"]
    elif "max_length" in asked:
        found["max_new_tokens"] = _behind(whole_number("max_length", asked["max_length"]), taken)
    if "min_new_tokens" in asked:
        found["min_new_tokens"] = asked["min_new_tokens"]
    elif "min_length" in asked:
        found["min_new_tokens"] = max(0, whole_number("min_length", asked["min_length"]) - taken)
    return found


def _default_count(defaults: GenerationDefaults, taken: int, held: int, limit: int | None) -> int:
    """How many tokens to produce where a call does not say: as the model's config asks for, else `NEW_TOKENS`, within the positions of
    the model, of which prompts take `held`."""
    count = defaults.max_new_tokens or NEW_TOKENS
    if not defaults.max_new_tokens and defaults.max_length:
        count = _behind(defaults.max_length, taken)
    return count if limit is None else max(1, min(count, limit - held))


def _behind(length: int, taken: int) -> int:
    if length <= taken:
        raise InputError(
            f"max_length={length} leaves no token behind the {taken} of input_ids: give more, or max_new_tokens"
        )
    return length - taken


def _forbidden(asked: Mapping[str, Any], ends: Sequence[int]) -> dict[str, Any]:
    """The ids that may not come, as biases."""
    ids = [whole_number("suppress_tokens", item) for item in asked.get("suppress_tokens", ())]
    for word in asked.get("bad_words_ids", ()):
        if not isinstance(word, (list, tuple)) or len(word) != 1:
            raise InputError(
                f"bad_words_ids holds {shown(word)}: engines have no counterpart of words of several ids"
            )
        if word[0] not in ends:
            ids.append(whole_number("bad_words_ids", word[0]))
    return {"logit_bias": dict.fromkeys(ids, float("-inf"))} if ids else {}
