"""Reads the generation config that a model carries, as those of transformers do (`generation_config.json` of a folder)."""

from __future__ import annotations

from typing import Any

from torch import nn

from bmgraph.frontend.unwrap import unwrapped
from bmgraph.ir.generation_defaults import CHANGES_NOTHING, GenerationDefaults


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
            for name, neutral in CHANGES_NOTHING.items()
            if getattr(config, name, None) not in neutral
        ),
    )


def _id(config: Any, name: str) -> int | None:
    found: Any = getattr(config, name, None)
    return int(found) if _is_id(found) else None


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
