"""Reads the generation config that a model carries, as those of transformers do (`generation_config.json` of a folder)."""

from __future__ import annotations

from typing import Any

from torch import nn

from bmgraph.frontend.unwrap import unwrapped
from bmgraph.ir.generation_defaults import GenerationDefaults

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "do_sample": (None, False), "num_beams": (None, 1), "num_beam_groups": (None, 1), "min_length": (None, 0),
    "min_new_tokens": (None, 0), "repetition_penalty": (None, 1.0), "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0), "encoder_no_repeat_ngram_size": (None, 0), "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,), "forced_decoder_ids": (None,), "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []), "bad_words_ids": (None,), "sequence_bias": (None,),
    "guidance_scale": (None, 1, 1.0), "penalty_alpha": (None, 0.0), "stop_strings": (None,),
}  # fmt: skip
"""Setting that changes which ids are chosen, and that engines do not serve by themselves -> values that change nothing."""


def generation_defaults(model: nn.Module) -> GenerationDefaults:
    """The defaults of a model's `generation_config`; empty where it has none."""
    config: Any = getattr(unwrapped(model), "generation_config", None)
    if config is None:
        return GenerationDefaults()
    start = _id(config, "decoder_start_token_id")
    eos: Any = getattr(config, "eos_token_id", None)
    ends: Any = eos if isinstance(eos, (list, tuple)) else [eos]
    return GenerationDefaults(
        start=start if start is not None else _id(config, "bos_token_id"),
        eos=tuple(int(item) for item in ends if _is_id(item)),
        pad=_id(config, "pad_token_id"),
        max_new_tokens=_id(config, "max_new_tokens"),
        max_length=_id(config, "max_length"),
        unserved=tuple(
            f"{name}={getattr(config, name)!r}"
            for name, neutral in NEUTRAL.items()
            if getattr(config, name, None) not in neutral
        ),
    )


def _id(config: Any, name: str) -> int | None:
    found: Any = getattr(config, name, None)
    return int(found) if _is_id(found) else None


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
