"""Reads the folder of deltas that a resource gives, and checks that it is of the program's backbone."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bmgraph.deltas.backbone_match import check_trained_on
from bmgraph.deltas.peft_format import Adapter, read_adapter
from bmgraph.errors import MisplacedError, ResourceError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.utils.digest import digest


def load_adapter(context: Context, name: str) -> Adapter:
    """The adapter in the folder that resource `name` gives, read once for a run of a pass and its proof.

    History keeps a digest of the adapter's contents, not of its path. Raises ResourceError where the resource is not a
    path, BundleError where the folder is not a valid adapter.
    """
    path = context.resource(name)
    if not isinstance(path, (str, os.PathLike)):
        raise ResourceError(
            f"resource {name!r} is a {type(path).__name__}: give the path of an adapter folder"
        )
    if name not in context.read:
        context.read[name] = read_adapter(Path(path))
    adapter: Adapter = context.read[name]
    contents: dict[str, Any] = {}
    for part in adapter.parts:
        contents |= part.family.contents(part)
    context.digests[name] = digest(contents)
    return adapter


def check_backbone(program: Program, adapter: Adapter) -> None:
    """Raise MisplacedError where an adapter was trained on other weights, or on a model that computes another thing with them:
    see `check_trained_on`."""
    check_trained_on(adapter, program.fingerprint, program.computation)


def is_backbone_of(program: Program, adapters: Iterable[Adapter]) -> bool:
    """Whether adapters were trained on a program, as fingerprints, names and shapes tell."""
    try:
        for adapter in adapters:
            check_backbone(program, adapter)
            for part in adapter.parts:
                part.family.check_fits(program, part)
    except MisplacedError:
        return False
    return True


def with_adapter(program: Program, adapter: Adapter) -> Program:
    """A copy that computes what the program computes with an adapter, by other means than attaching it."""
    for part in adapter.parts:
        program = part.family.changed(program, part)
    return program
