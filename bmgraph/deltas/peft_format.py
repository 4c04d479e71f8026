"""Saves and loads deltas as folders in PEFT's adapter format.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. A folder saved here is also a bundle: its manifest,
which PEFT ignores, has checksums and the fingerprint of the backbone.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.deltas.low_rank import Delta, bound_deltas_of, deltas_of
from bmgraph.errors import BundleError, InputError
from bmgraph.ir.node_role import PROMPT
from bmgraph.ir.program import Program
from bmgraph.serialize.bundle import MANIFEST, read_bundle, strict_json, write_bundle
from bmgraph.serialize.opened import OpenedFile
from bmgraph.serialize.safetensors_io import read_tensors, write_tensors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

PREFIX = "base_model.model."
"""Prefix of the tensor names in PEFT's files; the module path follows."""

_KEY = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<letter>[AB])\.weight\Z")
_PATTERN = re.compile(r"\^?(?P<module>[A-Za-z0-9_.\\]+)\$?\Z")

PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",), "use_dora": (False, None), "use_qalora": (False, None), "use_bdlora": (None, False),
    "lora_bias": (False, None), "modules_to_save": (None, []), "target_parameters": (None, []),
    "layer_replication": (None,), "trainable_token_indices": (None,), "alora_invocation_tokens": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}  # fmt: skip
"""PEFT option -> the values with which an adapter is plain LoRA: two factors, and unchanged weights."""


@dataclass(frozen=True)
class Change:
    """Change of the weight of one module: `scale * B A` with A [r, in], B [out, r]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter: changes by module path, and the fingerprint of their backbone ("" if unknown)."""

    path: Path
    changes: Mapping[str, Change]
    dropout: float = 0.0
    backbone: str = ""


def save_adapter(program: Program, path: str | Path) -> None:
    """Save the deltas of a program as a folder that `LoadDelta`, `Deltas` and PEFT can load.

    Several deltas on one module are saved as one, whose rank is the sum of theirs. Raises InputError for a program without
    deltas or with a soft prompt, and for a delta that the format does not support: on some outputs of a linear, on experts,
    on a parameter that is not the `weight` of a module. Raises BundleError if the folder cannot be written; it then leaves
    nothing behind.
    """
    changes: dict[str, Change] = {}
    dropouts: set[float] = set()
    for module, deltas in _by_module(program).items():
        changes[module] = _combined(program, deltas)
        dropouts |= {delta.dropout for delta in deltas}
    prompts = [
        node for graph in program.graphs.values() for node in graph.nodes if node.meta.get("part") == PROMPT
    ]
    if prompts:
        raise InputError(
            "the program has a soft prompt, which the format of deltas does not support: save the whole program"
        )
    if not changes:
        raise InputError("the program has no delta to save: add one with LoRA, or save the whole program")
    config = _config(changes, max(dropouts), all(_is_transposed(delta) for delta in _deltas(program)))
    tensors = {}
    for module, change in changes.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = change.a
        tensors[f"{PREFIX}{module}.lora_B.weight"] = change.b
    text = json.dumps(config, indent=2, allow_nan=False)
    write_bundle(
        Path(path),
        "delta",
        {"backbone": program.fingerprint},
        {
            CONFIG: lambda file: _write_text(file, text),
            TENSORS: lambda file: write_tensors(file, tensors),
        },
    )


def read_adapter(path: str | Path) -> Adapter:
    """Load an adapter that bmgraph or PEFT saved.

    Raises BundleError for a folder that is missing, truncated or altered, and for an adapter that is not plain LoRA.
    """
    path = Path(path)
    backbone = ""
    sources: dict[str, Path | OpenedFile] = {name: path / name for name in (CONFIG, TENSORS)}
    if (path / MANIFEST).exists():
        bundle = read_bundle(path)
        if bundle.kind != "delta":
            raise BundleError(f"{path} holds a {bundle.kind}, not a delta")
        backbone = str(bundle.manifest.get("backbone", ""))
        sources |= bundle.opened
    for name in (CONFIG, TENSORS):
        if isinstance(sources[name], Path) and not (path / name).exists():
            raise BundleError(f"{path} is not an adapter: it has no {name}")
    config = strict_json(sources[CONFIG])
    _check_config(path, config)
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in read_tensors(sources[TENSORS]).items():
        match = _KEY.match(key)
        if match is None:
            raise BundleError(
                f"{path} holds {key!r}: expected {PREFIX}<module>.lora_A.weight or lora_B.weight"
            )
        factors.setdefault(match["module"], {})[match["letter"]] = tensor
    if not factors:
        raise BundleError(f"{path} holds no tensors")
    changes = {module: _change(path, config, module, pair) for module, pair in factors.items()}
    return Adapter(path, changes, _number(path, config, "lora_dropout", 0.0), backbone)


def module_name(program: Program, site: str, linear: fx.Node) -> str | None:
    """The module whose `weight` a linear multiplies by; None if it is not the weight of a module.

    A tied weight has several names: the one of the linear's own module comes first.
    """
    names = [site, *(alias for alias, name in program.ties.items() if name == site)]
    paths = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    here = [path for path in paths if path == linear.meta.get("scope")]
    return next(iter(here or paths), None)


def _deltas(program: Program) -> list[Delta]:
    return [delta for graph in program.graphs.values() for delta in deltas_of(graph)]


def _by_module(program: Program) -> dict[str, list[Delta]]:
    """Module -> its deltas. A delta on several uses of a linear counts once. Raises InputError as `save_adapter` does."""
    for graph in program.graphs.values():
        for site, bound in bound_deltas_of(graph).items():
            raise InputError(
                f"the delta on {site} cannot be saved: PEFT's format supports none for {bound}; save the whole program"
            )
    found: dict[str, dict[str, Delta]] = {}
    for delta in _deltas(program):
        module = module_name(program, delta.site, delta.linear)
        if module is None:
            raise InputError(
                f"the delta on {delta.site} cannot be saved: it is not the `weight` of a module, as PEFT's format requires; "
                "save the whole program"
            )
        if delta.b.op != "get_attr":
            raise InputError(
                f"the delta on {module} cannot be saved: PEFT's format supports no delta on some outputs of a linear "
                f"(a role within a fused one); use LoRA(targets=({module!r},)), or save the whole program"
            )
        found.setdefault(module, {}).setdefault(str(delta.b.target), delta)
    return {module: list(deltas.values()) for module, deltas in found.items()}


def _combined(program: Program, deltas: list[Delta]) -> Change:
    """Several deltas on one linear as one: A and B concatenated along the rank, scales multiplied into B."""
    factors = [(evaluate(program, delta.a), evaluate(program, delta.b)) for delta in deltas]
    if len(factors) == 1:
        return Change(*factors[0], deltas[0].scale)
    a = torch.cat([a for a, _ in factors])
    b = torch.cat([b * delta.scale for (_, b), delta in zip(factors, deltas)], 1)
    return Change(a, b, 1.0)


def _is_transposed(delta: Delta) -> bool:
    weight: Any = delta.linear.args[1]
    return weight.target is torch.ops.aten.t.default


def _config(changes: Mapping[str, Change], dropout: float, transposed: bool) -> dict[str, Any]:
    """PEFT's configuration: the most frequent rank and alpha, and patterns for modules with others."""
    ranks = {module: change.a.shape[0] for module, change in changes.items()}
    alphas = {module: _round(change.scale * ranks[module]) for module, change in changes.items()}
    rank, alpha = (Counter(table.values()).most_common(1)[0][0] for table in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "rank_pattern": {f"^{module}": value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{module}": value for module, value in alphas.items() if value != alpha},
        "target_modules": list(changes),
        "fan_in_fan_out": transposed,
        "bias": "none",
        "modules_to_save": None,
    }


def _round(alpha: float) -> float:
    """`alpha` as an integer if it is one up to rounding."""
    nearest = round(alpha)
    return nearest if math.isclose(alpha, nearest, rel_tol=1e-12) else alpha


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def _check_config(path: Path, config: Any) -> None:
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


def _change(path: Path, config: Mapping[str, Any], module: str, pair: Mapping[str, torch.Tensor]) -> Change:
    """The change of one module from its two factors. Raises BundleError if they are not valid."""
    if set(pair) != {"A", "B"}:
        raise BundleError(f"{path} has only lora_{next(iter(pair))} of {module}: expected lora_A and lora_B")
    a, b = pair["A"], pair["B"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or a.shape[0] < 1:
        raise BundleError(
            f"{path}: the factors of {module} do not fit: A {list(a.shape)}, B {list(b.shape)}; expected [r, in], [out, r]"
        )
    if not all(item.is_floating_point() and bool(torch.isfinite(item).all()) for item in (a, b)):
        raise BundleError(f"{path}: the factors of {module} are not all finite floating-point numbers")
    alpha = _number(path, config, "lora_alpha", 8.0)
    pattern = config.get("alpha_pattern") or {}
    for key in pattern if isinstance(pattern, dict) else ():
        if _matches(path, key, module):
            alpha = _number(path, pattern, key, alpha)
            break
    rank = a.shape[0]
    return Change(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _matches(path: Path, pattern: str, module: str) -> bool:
    """Whether a key of PEFT's patterns matches a module: its whole path, or the end of it after a dot.

    Raises BundleError for other regular expressions: a malicious one may never finish.
    """
    match = _PATTERN.match(pattern)
    if match is None:
        raise BundleError(f"{path} has the pattern {pattern!r}: only module paths are supported")
    name = match["module"].replace("\\.", ".")
    return module == name or (not pattern.startswith("^") and module.endswith(f".{name}"))


def _number(path: Path, table: Mapping[str, Any], key: str, default: float) -> float:
    value = table.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BundleError(f"{path} has {key}={value!r}: expected a number")
    return float(value)
