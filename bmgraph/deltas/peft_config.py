"""Reads `adapter_config.json` of PEFT: which options are those of plain LoRA, and the scale of each module."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bmgraph.errors import BundleError

_PATTERN = re.compile(r"\^?(?P<module>(?:[A-Za-z0-9_.]|\\\.)+)\$?\Z")

PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",), "use_dora": (False, None), "use_qalora": (False, None), "use_bdlora": (None, False),
    "lora_bias": (False, None), "target_parameters": (None, []),
    "layer_replication": (None,), "trainable_token_indices": (None,), "alora_invocation_tokens": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}  # fmt: skip
"""PEFT option -> the values with which an adapter is plain LoRA: two factors, and unchanged weights."""

READ = frozenset(
    {"peft_type", "r", "lora_alpha", "lora_dropout", "alpha_pattern", "use_rslora", "modules_to_save", "ensure_weight_tying"}
)  # fmt: skip
"""PEFT options that are read."""

WITHOUT_EFFECT = frozenset(
    {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
     "target_modules", "exclude_modules", "fan_in_fan_out", "layers_to_transform", "layers_pattern", "rank_pattern",
     "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
     "qalora_group_size", "runtime_config"}
)  # fmt: skip
"""PEFT options that do not change what a saved adapter computes: the names and shapes of its tensors say what they do."""

NOTHING: tuple[Any, ...] = (None, False, "", [], {})
"""Values with which an option that is not known is taken as not given."""


def check_config(path: Path, config: Any) -> None:
    """Raise BundleError if the configuration is not one of plain LoRA."""
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise BundleError(f"{path} holds an adapter of type {kind!r}: only LORA can be loaded")
    for option, allowed in PLAIN.items():
        value = config.get(option, allowed[0])
        if value not in allowed:
            raise BundleError(
                f"{path} has {option}={value!r}: only plain LoRA can be loaded; expected one of {allowed}"
            )
    for option in sorted(set(config) - set(PLAIN) - READ - WITHOUT_EFFECT):
        if config[option] not in NOTHING:
            raise BundleError(
                f"{path} has {option}={str(config[option])[:80]}, an option that is not known here: what it changes would "
                "be lost; only plain LoRA can be loaded"
            )


def scale_of(path: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    """The factor of `B A` of a module. Raises BundleError for numbers and patterns that cannot be read."""
    alpha = number(path, config, "lora_alpha", 8.0)
    pattern = config.get("alpha_pattern") or {}
    for key in pattern if isinstance(pattern, dict) else ():
        if _matches(path, key, module):
            alpha = number(path, pattern, key, alpha)
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def saved_modules(path: Path, config: Mapping[str, Any]) -> list[str]:
    """The names in `modules_to_save`; raises BundleError where they are no list of names."""
    names = config.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise BundleError(f"{path} has modules_to_save={names!r}: expected a list of names")
    return names


def number(path: Path, table: Mapping[str, Any], key: str, default: float) -> float:
    """A finite number of a table; raises BundleError for anything else."""
    value = table.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BundleError(f"{path} has {key}={value!r}: expected a number")
    return float(value)


def _matches(path: Path, pattern: str, module: str) -> bool:
    """Whether a key of PEFT's patterns matches a module: its whole path, or the end of it after a dot.

    The keys are regular expressions, so a dot stands for any character. Raises BundleError for others: a malicious one
    may never finish.
    """
    match = _PATTERN.match(pattern)
    if match is None:
        raise BundleError(f"{path} has the pattern {pattern!r}: only module paths are supported")
    begin = "" if pattern.startswith("^") else r"(.*\.)?"
    return re.fullmatch(begin + match["module"], module) is not None
