"""Saves and loads deltas as folders in PEFT's adapter format.

A folder holds `adapter_config.json` and `adapter_model.safetensors`: the deltas of one family, which says what is in them,
and beside them the modules that were trained whole. A folder saved here is also a bundle: its manifest, which PEFT ignores,
has checksums and the fingerprint of the backbone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bmgraph.deltas.backbone import backbone_of
from bmgraph.deltas.family import PREFIX, DeltaFamily, Part, Saved
from bmgraph.deltas.peft_config import CONFIG, flag
from bmgraph.deltas.registry import ENTRY_POINTS, deltas_of, families
from bmgraph.errors import BundleError, InputError
from bmgraph.ir.computation import Computation
from bmgraph.ir.joined_graphs import join
from bmgraph.ir.program import Program
from bmgraph.serialize.bundle import MANIFEST, read_bundle, strict_json, write_bundle
from bmgraph.serialize.opened import OpenedFile, open_user_file
from bmgraph.serialize.safetensors_io import read_tensors, write_tensors

TENSORS = "adapter_model.safetensors"
COMPUTATION = "computation.json"
"""What the model computes that the delta was trained on; PEFT ignores this file, and does not write it."""


@dataclass(frozen=True)
class Adapter:
    """A loaded folder: what each family finds in it, in the order in which they are put on a program, the fingerprint of
    the backbone that it was trained on, and what that computes (empty if unknown)."""

    path: Path
    parts: tuple[Part, ...]
    backbone: str = ""
    computation: Computation = field(default_factory=Computation)


def save_adapter(program: Program, path: str | Path) -> None:
    """Save the deltas of a program as a folder that `LoadDelta`, `Deltas` and, for families that it has, PEFT can load.

    Modules that train whole beside them are saved as PEFT's `modules_to_save`. Raises InputError for a program without
    deltas or with those of several families, where other weights of the model are trained too, which would be lost, and
    for a delta that its family's format does not support, such as a soft prompt, or one on some outputs of a linear or on
    experts. Raises BundleError if the folder cannot be written; it then leaves nothing behind.
    """
    program, _ = join(program)
    deltas_of(program.graph)  # all are of known families
    parts = [part for family in families() if (part := family.saved(program)) is not None]
    if not parts:
        raise InputError(
            "the program has no delta to save: add one, with LoRA for example, or save the whole program"
        )
    config = _config(parts)
    _check_all_saved(program)
    prefix = next((part.family.module_prefix for part in parts if not part.family.beside), PREFIX)
    tensors = {
        (
            f"{prefix}{name.removeprefix(PREFIX)}" if part.family.beside and name.startswith(PREFIX) else name
        ): tensor
        for part in parts
        for name, tensor in part.tensors.items()
    }
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

    Raises BundleError for a folder that is missing, truncated or altered, and for an adapter of no known family.
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
    main = _family_of(path, config)
    tensors = dict(read_tensors(sources[TENSORS]))
    for source in sources.values():
        _check_still_there(path, source)
    if main.module_prefix != PREFIX:
        tensors = {_by_module(name, main.module_prefix): value for name, value in tensors.items()}
    parts = [family.loaded(path, config, tensors) for family in (main, *_beside())]
    if all(part.empty for part in parts):
        raise BundleError(f"{path} holds no tensors of a delta")
    beside = [part for part in parts[1:] if part.family.contents(part)]
    return Adapter(path, (*beside, parts[0]), backbone, computation)


def _family_of(path: Path, config: Any) -> DeltaFamily:
    """The family whose deltas a folder holds; raises BundleError for another type than those of known families."""
    kind = config.get("peft_type") if isinstance(config, dict) else None
    own = [family for family in families() if family.peft_type and not family.variant]
    known = {kind: family for family in own for kind in (family.peft_type, *family.also_read)}
    for family in families():
        if family.variant and kind == family.peft_type and flag(path, config, family.variant):
            return family
    if not isinstance(kind, str) or kind not in known:
        raise BundleError(
            f"{path} holds an adapter of type {str(kind)[:80]!r}: only {', '.join(known)} can be loaded (another package adds a type by "
            f"an entry point of {ENTRY_POINTS!r})"
        )
    return known[kind]


def _by_module(name: str, prefix: str) -> str:
    """The name of a tensor in the folders of most families."""
    if name.startswith(PREFIX) or not name.startswith(prefix):
        return name
    return f"{PREFIX}{name.removeprefix(prefix)}"


def _beside() -> list[DeltaFamily]:
    return [family for family in families() if family.beside]


def _config(parts: Sequence[Saved]) -> dict[str, Any]:
    """The configuration of a folder: that of its one family, and what the families beside it add."""
    own = [part for part in parts if not part.family.beside]
    if len(own) > 1:
        raise InputError(
            f"the program has deltas of the families {' and '.join(part.family.name for part in own)}, and a folder holds one: "
            "merge those of the other, or save the whole program"
        )
    if own:
        config = {"peft_type": own[0].family.peft_type, **own[0].config}
    else:
        config = dict(parts[0].family.alone)
    config["modules_to_save"] = None  # PEFT writes it in any case
    for part in parts:
        config |= part.config if part.family.beside else {}
    return config


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
            f"use modules_to_save, as in LoRA(modules_to_save=({lost[0].rpartition('.')[0]!r},)), which trains and saves whole modules, or save the "
            "whole program"
        )


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
