"""Saves and loads deltas as folders in PEFT's adapter format.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. A folder saved here is also a bundle: its manifest,
which PEFT ignores, has checksums and the fingerprint of the backbone.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.deltas.low_rank import Delta, backbone_of, bound_deltas_of, deltas_of
from bmgraph.deltas.peft_config import CONFIG, Scales, check_config, flag, number, saved_modules
from bmgraph.deltas.whole_modules import mask_of, modules_of
from bmgraph.errors import BundleError, InputError
from bmgraph.ir.computation import Computation
from bmgraph.ir.node_role import PROMPT
from bmgraph.ir.program import Program
from bmgraph.serialize.bundle import MANIFEST, read_bundle, strict_json, write_bundle
from bmgraph.serialize.opened import OpenedFile, open_user_file
from bmgraph.serialize.safetensors_io import read_tensors, write_tensors

TENSORS = "adapter_model.safetensors"
COMPUTATION = "computation.json"
"""What the model computes that the delta was trained on; PEFT ignores this file, and does not write it."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Types of factors."""

PREFIX = "base_model.model."
"""Prefix of the tensor names in PEFT's files; the module path follows."""

_KEY = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<letter>[AB])\.weight\Z")


@dataclass(frozen=True)
class Change:
    """Change of the weight of one module: `scale * B A` with A [r, in], B [out, r]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter: changes by module path, the fingerprint of their backbone and what it computes (empty if unknown).

    whole: the new values of tensors that were trained whole (`modules_to_save`), by name; `tied`: where such a tensor is
    tied to another, both get the value. copies: what PEFT saves of the backbone itself, for vocabularies that grew.
    """

    path: Path
    changes: Mapping[str, Change]
    dropout: float = 0.0
    backbone: str = ""
    whole: Mapping[str, torch.Tensor] = field(default_factory=dict)
    copies: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tied: bool = False
    computation: Computation = field(default_factory=Computation)


def save_adapter(program: Program, path: str | Path) -> None:
    """Save the deltas of a program as a folder that `LoadDelta`, `Deltas` and PEFT can load.

    Several deltas on one module are saved as one, whose rank is the sum of theirs; modules that train whole beside them are
    saved as PEFT's `modules_to_save`. Raises InputError for a program without deltas or with a soft prompt, where other
    weights of the model are trained too, which would be lost, and for a delta that the format does not support: on some
    outputs of a linear, on experts, on a parameter that is not the `weight` of a module, with a dropout of its own. Raises
    BundleError if the folder cannot be written; it then leaves nothing behind.
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
    whole = _trained_whole(program)
    if not changes and not whole:
        raise InputError("the program has no delta to save: add one with LoRA, or save the whole program")
    _check_all_saved(program)
    if len(dropouts) > 1:
        raise InputError(
            f"deltas with the dropouts {', '.join(map(str, sorted(dropouts)))} cannot be saved: PEFT's format has one for "
            "all; save the whole program"
        )
    transposed = bool(changes) and all(_is_transposed(delta) for delta in _deltas(program))
    config = _config(changes, max(dropouts, default=0.0), transposed, whole)
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in whole.items()}
    for module, change in changes.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = change.a
        tensors[f"{PREFIX}{module}.lora_B.weight"] = change.b
    files = {CONFIG: json.dumps(config, indent=2, allow_nan=False)}
    if program.computation:
        files[COMPUTATION] = json.dumps(program.computation.as_json(), indent=1)
    write_bundle(
        Path(path),
        "delta",
        {"backbone": program.fingerprint},
        {
            **{name: partial(_write_text, text=text) for name, text in files.items()},
            TENSORS: lambda file: write_tensors(file, tensors),
        },
    )


def read_adapter(path: str | Path) -> Adapter:
    """Load an adapter that bmgraph or PEFT saved.

    Raises BundleError for a folder that is missing, truncated or altered, and for an adapter that is not plain LoRA.
    """
    path = Path(path)
    backbone, computation = "", Computation()
    sources: dict[str, OpenedFile] = {}
    if (path / MANIFEST).exists():
        bundle = read_bundle(path)
        if bundle.kind != "delta":
            raise BundleError(f"{path} holds a {bundle.kind}, not a delta")
        backbone = str(bundle.manifest.get("backbone", ""))
        sources |= bundle.opened
        if COMPUTATION in bundle.opened:
            computation = Computation.from_json(strict_json(bundle.open(COMPUTATION)))
    for name in (CONFIG, TENSORS):
        if name not in sources and not (path / name).exists():
            raise BundleError(f"{path} is not an adapter: it has no {name}")
        sources[name] = sources.get(name) or open_user_file(path / name)
    config = strict_json(sources[CONFIG])
    check_config(path, config)
    modules = saved_modules(path, config)
    factors: dict[str, dict[str, torch.Tensor]] = {}
    whole: dict[str, torch.Tensor] = {}
    copies: dict[str, torch.Tensor] = {}
    for key, tensor in read_tensors(sources[TENSORS]).items():
        match = _KEY.match(key)
        if match is not None:
            factors.setdefault(match["module"], {})[match["letter"]] = tensor
            continue
        name = _tensor_name(path, key)
        is_whole = any(module.endswith(end) for module in modules_of(name) for end in modules)
        (whole if is_whole else copies)[name] = tensor
    for source in sources.values():
        _check_still_there(path, source)
    if not factors and not whole:
        raise BundleError(f"{path} holds no tensors of a delta")
    for name, tensor in (whole | copies).items():
        _check_values(path, name, tensor)
    scales = Scales(path, config, len(factors))
    return Adapter(
        path,
        {module: _change(path, scales, module, pair) for module, pair in factors.items()},
        _dropout(path, config),
        backbone,
        whole,
        copies,
        flag(path, config, "ensure_weight_tying"),
        computation,
    )


def _check_still_there(path: Path, file: OpenedFile) -> None:
    """Raise BundleError if a file without a checksum was replaced or written to since it was opened.

    PEFT writes an adapter's files one after the other: they may be of two adapters.
    """
    if file.expected:
        return
    file.check_unwritten()
    try:
        same = os.path.samestat(file.status, file.path.stat())
    except OSError:
        same = False
    if not same:
        raise BundleError(f"{file.path.name} was written anew while {path} was read: load it again")


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


def _trained_whole(program: Program) -> dict[str, torch.Tensor]:
    """Name -> tensor of what trains whole beside the deltas, pruned where the program prunes it.

    Raises InputError where a pass has replaced one.
    """
    tensors = program.tensors()
    missing = sorted(program.trained_whole - set(tensors))
    if missing:
        raise InputError(
            f"{', '.join(missing[:3])} was trained with the delta and is not a tensor of the program any more: a pass has "
            "replaced it; save the delta of the program before that pass, or save the whole program"
        )
    masks = {name: mask_of(program, name) for name in program.trained_whole}
    return {
        name: tensors[name] if (mask := masks[name]) is None else tensors[name] * mask
        for name in sorted(program.trained_whole)
    }


def _check_all_saved(program: Program) -> None:
    """Raise InputError where weights of the model are trained that the folder would not hold."""
    lost = [
        name
        for name, tensor in backbone_of(program).items()
        if name not in program.frozen and tensor.is_floating_point()
    ]
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise InputError(
            f"{', '.join(lost[:3])}{more} are not frozen, so they are trained too, and a folder of deltas would lose them: "
            f"use LoRA(modules_to_save=({lost[0].rpartition('.')[0]!r},)), which trains and saves whole modules, or save the "
            "whole program"
        )


def _tensor_name(path: Path, key: str) -> str:
    """The name of a tensor of the model in an adapter's file, which has a new value or PEFT's copy of it.

    Raises BundleError for any other tensor.
    """
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    if key.startswith(PREFIX) and not any(part.startswith("lora_") for part in name.split(".")):
        return name
    if re.search(r"\.lora_embedding_[AB]\Z", key):
        raise BundleError(
            f"{path} holds {key!r}: a delta on an embedding, which is looked up, not multiplied; only deltas on linears can "
            "be loaded: merge it into the model with PEFT first"
        )
    raise BundleError(f"{path} holds {key!r}: expected {PREFIX}<module>.lora_A.weight or lora_B.weight")


def _config(
    changes: Mapping[str, Change], dropout: float, transposed: bool, whole: Iterable[str]
) -> dict[str, Any]:
    """PEFT's configuration: the most frequent rank and alpha, and patterns for modules with others."""
    ranks = {module: change.a.shape[0] for module, change in changes.items()}
    alphas = {module: _round(change.scale * ranks[module]) for module, change in changes.items()}
    rank, alpha = (Counter(table.values()).most_common(1)[0][0] if table else 1 for table in (ranks, alphas))
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
        "modules_to_save": sorted({name.rpartition(".")[0] for name in whole}) or None,
    }


def _round(alpha: float) -> float:
    """`alpha` as an integer if it is one up to rounding."""
    nearest = round(alpha)
    return nearest if math.isclose(alpha, nearest, rel_tol=1e-12) else alpha


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def _dropout(path: Path, config: Mapping[str, Any]) -> float:
    dropout = number(path, config, "lora_dropout", 0.0)
    if not 0 <= dropout < 1:
        raise BundleError(f"{path} has lora_dropout={dropout}: expected a share of at least 0 and below 1")
    return dropout


def _check_values(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Raise BundleError for floating-point numbers of a type that is no weight's, or that are not finite."""
    if not tensor.is_floating_point():
        return
    if tensor.dtype not in DTYPES:
        raise BundleError(
            f"{path} holds {name} as {tensor.dtype}: expected one of {', '.join(map(str, DTYPES))}; convert it first"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise BundleError(f"{path}: {name} holds NaN or infinity")


def _change(path: Path, scales: Scales, module: str, pair: Mapping[str, torch.Tensor]) -> Change:
    """The change of one module from its two factors. Raises BundleError if they are not valid."""
    if set(pair) != {"A", "B"}:
        raise BundleError(f"{path} has only lora_{next(iter(pair))} of {module}: expected lora_A and lora_B")
    a, b = pair["A"], pair["B"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or a.shape[0] < 1:
        raise BundleError(
            f"{path}: the factors of {module} do not fit: A {list(a.shape)}, B {list(b.shape)}; expected [r, in], [out, r]"
        )
    for letter, factor in pair.items():
        if not factor.is_floating_point():
            raise BundleError(
                f"{path}: lora_{letter} of {module} is {factor.dtype}, not floating-point numbers"
            )
        _check_values(path, f"lora_{letter} of {module}", factor)
    change = Change(a, b, scales.of(module, a.shape[0]))
    _check_size(path, module, change)
    return change


def _check_size(path: Path, module: str, change: Change) -> None:
    """Raise BundleError where the products of a change may be beyond what fp32 holds: they would become infinite."""
    if not change.a.numel() or not change.b.numel():
        return
    largest = [float(factor.abs().max()) for factor in (change.a, change.b)]
    product = abs(change.scale) * largest[0] * largest[1] * change.a.shape[0]
    if not max(*largest, abs(change.scale), product) < torch.finfo(torch.float32).max:
        raise BundleError(
            f"{path}: the change of {module} (scale {change.scale:g}, factors up to {largest[0]:g} and {largest[1]:g}) is "
            "beyond what fp32 holds: it was altered, or its training diverged"
        )
