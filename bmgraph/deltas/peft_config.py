"""Reads `adapter_config.json` of PEFT: which options are those of plain LoRA, and the scale of each module."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bmgraph.errors import BundleError

CONFIG = "adapter_config.json"
MOST_PATTERNS, MOST_TRIALS = 50_000, 4_000_000
"""How many patterns are read, and how many pairs of a pattern and a module are tried: seconds."""

_PATTERN = re.compile(r"\^?(?P<module>(?:[A-Za-z0-9_.]|\\\.)+)\$?\Z")

BIASES = ("none", "all", "lora_only")
"""PEFT's values of `bias`: which biases of the model train beside the factors."""

PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": BIASES, "use_dora": (False, None), "use_qalora": (False, None), "use_bdlora": (None, False),
    "lora_bias": (False, None), "target_parameters": (None, []),
    "layer_replication": (None,), "trainable_token_indices": (None,), "alora_invocation_tokens": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}  # fmt: skip
"""PEFT option -> the values with which an adapter is plain LoRA: two factors, and unchanged weights."""

READ = frozenset(
    {"peft_type", "r", "lora_alpha", "lora_dropout", "alpha_pattern", "use_rslora", "modules_to_save", "ensure_weight_tying",
     "class_rows"}
)  # fmt: skip
"""Options that are read: PEFT's, and those of families beside others."""

WITHOUT_EFFECT = frozenset(
    {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
     "target_modules", "exclude_modules", "fan_in_fan_out", "layers_to_transform", "layers_pattern", "rank_pattern",
     "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
     "qalora_group_size", "runtime_config"}
)  # fmt: skip
"""PEFT options that do not change what a saved adapter computes: the names and shapes of its tensors say what they do."""

SAVED: Mapping[str, Any] = MappingProxyType(
    {"base_model_name_or_path": None, "task_type": None, "inference_mode": True}
)
"""What is said first in every configuration that is saved."""

NOTHING: tuple[Any, ...] = (None, False, "", [], {})
"""Values with which an option that is not known is taken as not given."""


def check_config(path: Path, config: Mapping[str, Any], variant: str = "") -> None:
    """Raise BundleError if the configuration is not one of plain LoRA, or of the variant of an option that is true."""
    for option, allowed in PLAIN.items():
        if option == variant:
            continue
        value = config.get(option, allowed[0])
        if value not in allowed:
            raise BundleError(
                f"{path} has {option}={value!r}: only plain LoRA can be loaded; expected one of {allowed}"
            )
    _check_options(path, config, PLAIN, "only plain LoRA can be loaded")


def check_known(path: Path, config: Mapping[str, Any], known: Collection[str], family: str) -> None:
    """Raise BundleError for an option that is given, and that is neither of every adapter nor `known`."""
    _check_options(path, config, {*known, "bias"}, f"it cannot be loaded as a delta of the family {family!r}")


def _check_options(path: Path, config: Mapping[str, Any], known: Collection[str], therefore: str) -> None:
    for option in sorted(set(config) - set(known) - READ - WITHOUT_EFFECT):
        if config[option] not in NOTHING:
            raise BundleError(
                f"{path} has {option}={str(config[option])[:80]}, an option that is not known here: what it changes would be "
                f"lost; {therefore}"
            )


class Scales:
    """The factor of `B A` of each module. Raises BundleError for numbers and patterns that cannot be read, or lie."""

    def __init__(self, path: Path, config: Mapping[str, Any], modules: int) -> None:
        self._path, self._config = path, config
        self._rslora = flag(path, config, "use_rslora")
        self._alphas = self._patterns("alpha_pattern", modules)
        self._ranks = self._patterns("rank_pattern", modules)

    def of(self, module: str, rank: int) -> float:
        """The factor of a module whose factors have this rank."""
        said = self._number(self._ranks, module, number(self._path, self._config, "r", rank))
        if said != rank:
            raise BundleError(
                f"{self._path}: the factors of {module} have the rank {rank}, but its {CONFIG} says {said:g}: take both files "
                "of one adapter"
            )
        alpha = self._number(self._alphas, module, number(self._path, self._config, "lora_alpha", 8.0))
        return alpha / (math.sqrt(rank) if self._rslora else rank)

    def _patterns(self, option: str, modules: int) -> list[tuple[_Pattern, float]]:
        """The patterns of an option and their numbers, in order; each is tried on each module."""
        table = self._config.get(option) or {}
        if not isinstance(table, dict):
            raise BundleError(
                f"{self._path} has {option}={str(table)[:80]}: expected an object of module paths"
            )
        if len(table) > MOST_PATTERNS or len(table) * modules > MOST_TRIALS:
            raise BundleError(
                f"{self._path} has {len(table)} patterns in {option} for {modules} modules: at most {MOST_PATTERNS} patterns and "
                f"{MOST_TRIALS} pairs of them are tried; merge the adapter into its model with PEFT first"
            )
        return [(_Pattern.of(self._path, key), number(self._path, table, key, 0.0)) for key in table]

    @staticmethod
    def _number(patterns: list[tuple[_Pattern, float]], module: str, otherwise: float) -> float:
        return next((found for pattern, found in patterns if pattern.fits(module)), otherwise)


def number(path: Path, table: Mapping[str, Any], key: str, default: float) -> float:
    """A finite number of a table; raises BundleError for anything else."""
    value = table.get(key, default)
    if not is_number(value):
        raise BundleError(f"{path} has {key}={str(value)[:80]!r}: expected a number")
    return float(value)


def share(path: Path, table: Mapping[str, Any], key: str) -> float:
    """A number of at least 0 and below 1, 0 where there is none; raises BundleError for anything else."""
    value = number(path, table, key, 0.0)
    if not 0 <= value < 1:
        raise BundleError(f"{path} has {key}={value}: expected a share of at least 0 and below 1")
    return value


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def flag(path: Path, config: Mapping[str, Any], key: str) -> bool:
    """A truth value, false where there is none; raises BundleError for anything else, such as a text."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise BundleError(f"{path} has {key}={str(value)[:80]!r}: expected true or false")
    return bool(value)


@dataclass(frozen=True)
class _Pattern:
    """A key of PEFT's patterns: it matches the whole path of a module, or the end of it after a dot.

    The keys are regular expressions, so a dot stands for any character. Others than paths are refused, since a malicious
    one may never finish, and none is compiled, since that takes long.
    """

    letters: str
    """One for each letter of a path: "." for any, "\\0" for a dot."""
    whole: bool

    @staticmethod
    def of(path: Path, key: str) -> _Pattern:
        """The pattern of a key; raises BundleError for one that is not a path."""
        match = _PATTERN.match(key)
        if match is None:
            raise BundleError(f"{path} has the pattern {key[:80]!r}: only module paths are supported")
        return _Pattern(match["module"].replace("\\.", "\0"), key.startswith("^"))

    def fits(self, module: str) -> bool:
        """Whether it matches a module."""
        before = len(module) - len(self.letters)
        if before < 0 or (before and (self.whole or module[before - 1] != ".")):
            return False
        return all(
            letter in (".", found) or (letter == "\0" and found == ".")
            for letter, found in zip(self.letters, module[before:])
        )
