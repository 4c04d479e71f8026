"""Low-rank deltas in PEFT's format: their part of `adapter_config.json`, and their factors."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from bmgraph.deltas.family import PREFIX, Change, Delta, DeltaFamily, Part, Saved
from bmgraph.deltas.file_values import check_values
from bmgraph.deltas.peft_config import SAVED, Scales, check_config, share
from bmgraph.errors import BundleError, InputError
from bmgraph.ir.program import Program

DROPOUT = "dropout"
"""The option of a delta that is the probability of dropout in front of A."""

MAGNITUDE = "magnitude"
"""The key of the norms [out] of the rows of a weight that a DoRA delta has beside its factors."""

_KEY = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<what>A\.weight|B\.weight|magnitude_vector(\.weight)?)\Z"
)


def saved_low_rank(family: DeltaFamily, program: Program, deltas: Mapping[str, list[Delta]]) -> Saved | None:
    """What PEFT's format holds of the deltas of each module; None without any.

    Raises InputError for deltas with different dropouts.
    """
    if not deltas:
        return None
    every = [delta for found in deltas.values() for delta in found]
    dropouts = {delta.options[DROPOUT] for delta in every}
    if len(dropouts) > 1:
        raise InputError(
            f"deltas with the dropouts {', '.join(map(str, sorted(dropouts)))} cannot be saved: PEFT's format has one for "
            "all; save the whole program"
        )
    changes = {module: _combined(program, found) for module, found in deltas.items()}
    tensors: dict[str, torch.Tensor] = {}
    for module, change in changes.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = change.tensors["a"]
        tensors[f"{PREFIX}{module}.lora_B.weight"] = change.tensors["b"]
        if MAGNITUDE in change.tensors:
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = change.tensors[MAGNITUDE]
    config = low_rank_config(changes, max(dropouts), all(map(is_transposed, every)))
    if family.variant:
        config[family.variant] = True
    return Saved(family, config, tensors)


def low_rank_config(changes: Mapping[str, Change], dropout: float, transposed: bool) -> dict[str, Any]:
    """PEFT's configuration: the most frequent rank and alpha, and patterns for modules with others."""
    ranks = {module: change.tensors["a"].shape[0] for module, change in changes.items()}
    alphas = {module: _round(change.numbers["scale"] * ranks[module]) for module, change in changes.items()}
    rank, alpha = (Counter(table.values()).most_common(1)[0][0] if table else 1 for table in (ranks, alphas))
    return {
        **SAVED,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "rank_pattern": {f"^{module}": value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{module}": value for module, value in alphas.items() if value != alpha},
        "target_modules": list(changes),
        "fan_in_fan_out": transposed,
        "bias": "none",
    }


def read_low_rank(
    family: DeltaFamily, path: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]
) -> Part:
    """The change of each module, taken out of `tensors`. Raises BundleError for what is not plain LoRA."""
    check_config(path, config, family.variant)
    wanted = {"A", "B", *(["magnitude"] if family.variant else [])}
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for key in list(tensors):
        match = _KEY.match(key)
        if match is not None:
            what = match["what"].partition(".")[0].removesuffix("_vector")
            factors.setdefault(match["module"], {})[what] = tensors.pop(key)
        elif re.search(r"\.lora_embedding_[AB]\Z", key):
            raise BundleError(
                f"{path} holds {key!r}: a delta on an embedding, which is looked up, not multiplied; only deltas on linears "
                "can be loaded: merge it into the model with PEFT first"
            )
        elif any(part.startswith("lora_") for part in key.split(".")):
            raise BundleError(
                f"{path} holds {key!r}: expected {PREFIX}<module>.lora_A.weight or lora_B.weight"
            )
    scales = Scales(path, config, len(factors))
    changes = {module: _change(path, scales, module, own, wanted) for module, own in factors.items()}
    return Part(family, path, changes, {DROPOUT: share(path, config, "lora_dropout")})


def _combined(program: Program, deltas: list[Delta]) -> Change:
    """Several deltas on one linear as one: A and B concatenated along the rank, scales multiplied into B."""
    changes = [delta.change(program) for delta in deltas]
    if len(changes) == 1:
        return changes[0]
    a = torch.cat([change.tensors["a"] for change in changes])
    b = torch.cat([change.tensors["b"] * change.numbers["scale"] for change in changes], 1)
    return Change({"a": a, "b": b}, {"scale": 1.0})


def is_transposed(delta: Delta) -> bool:
    """Whether the weight of its linear is stored [in, out], PEFT's `fan_in_fan_out`."""
    weight: Any = delta.linear.args[1]
    return weight.target is torch.ops.aten.t.default


def _round(alpha: float) -> float:
    """`alpha` as an integer if it is one up to rounding."""
    nearest = round(alpha)
    return nearest if math.isclose(alpha, nearest, rel_tol=1e-12) else alpha


def _change(
    path: Path, scales: Scales, module: str, own: Mapping[str, torch.Tensor], wanted: Collection[str]
) -> Change:
    """The change of one module from its two factors, and its norms. Raises BundleError if they are not valid."""
    if set(own) != set(wanted):
        raise BundleError(
            f"{path} has only {' and '.join(f'lora_{name}' for name in sorted(own))} of {module}: expected "
            f"{' and '.join(f'lora_{name}' for name in sorted(wanted))}"
        )
    a, b = own["A"], own["B"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or a.shape[0] < 1:
        raise BundleError(
            f"{path}: the factors of {module} do not fit: A {list(a.shape)}, B {list(b.shape)}; expected [r, in], [out, r]"
        )
    for letter, factor in own.items():
        if not factor.is_floating_point():
            raise BundleError(
                f"{path}: lora_{letter} of {module} is {factor.dtype}, not floating-point numbers"
            )
        check_values(path, f"lora_{letter} of {module}", factor)
    scale = scales.of(module, a.shape[0])
    _check_size(path, module, (a, b), scale)
    change = {"a": a, "b": b}
    if "magnitude" in own:
        change[MAGNITUDE] = own["magnitude"].reshape(-1)
        if len(change[MAGNITUDE]) != b.shape[0]:
            raise BundleError(
                f"{path}: {module} has {own['magnitude'].numel()} magnitudes for {b.shape[0]} outputs"
            )
    return Change(change, {"scale": scale})


def _check_size(path: Path, module: str, factors: tuple[torch.Tensor, torch.Tensor], scale: float) -> None:
    """Raise BundleError where the products of a change may be beyond what fp32 holds: they would become infinite."""
    if not all(factor.numel() for factor in factors):
        return
    ends = [torch.aminmax(factor) for factor in factors]
    largest = [max(-float(low), float(high)) for low, high in ends]
    product = abs(scale) * largest[0] * largest[1] * factors[0].shape[0]
    if not max(*largest, abs(scale), product) < torch.finfo(torch.float32).max:
        raise BundleError(
            f"{path}: the change of {module} (scale {scale:g}, factors up to {largest[0]:g} and {largest[1]:g}) is "
            "beyond what fp32 holds: it was altered, or its training diverged"
        )
