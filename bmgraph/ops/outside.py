"""Operators of other packages, which add them by entry points in the group `bmgraph.operators`.

The name of an entry point is a namespace of operators, its value an `Operator`, or a tuple of them, in the module that
registers them with `torch.library`. It is imported when a program calls an operator of that namespace, or when a file
that needs its package is loaded in trust of it; never because of what a file says alone.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import torch

from bmgraph.errors import InputError
from bmgraph.ops.trait_row import UNKNOWN, Traits

GROUP = "bmgraph.operators"
"""The entry-point group in which other packages add operators: `namespace = module:operators`."""

OURS = frozenset({"aten", "prims", "bmgraph", "_c10d_functional"})
"""The namespaces of operators that need no other package than torch and bmgraph."""


@dataclass(frozen=True)
class Operator:
    """An operator of another package: all that bmgraph needs to know of it.

    `call` is its overload, which is pure, has a fake kernel, and returns tensors. `traits` is its row in the table of
    operators; the defaults claim nothing. `onnx` translates it: a function of the call's arguments, tensors as onnxscript
    values, that returns what it makes of them; without one it cannot be lowered to ONNX.
    """

    call: torch._ops.OpOverload
    traits: Traits = UNKNOWN
    onnx: Callable[..., Any] | None = None


def is_outside(target: Any) -> bool:
    """Whether a call's target is an operator of neither torch nor bmgraph."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace not in OURS


def outside_packages() -> list[str]:
    """The names of the installed packages that add operators; none is imported."""
    return sorted({package_of(point) for point in entry_points(group=GROUP)})


def outside_operators(package: str) -> tuple[Operator, ...]:
    """The operators that an installed package adds, which is imported; none if it is not installed or adds none.

    Raises InputError for an entry point that does not give operators.
    """
    wanted = normalized(package)
    points = [point for point in entry_points(group=GROUP) if package_of(point) == wanted]
    return tuple(item for point in points for item in _operators(point))


def find_outside(target: Any) -> tuple[str, Operator] | None:
    """The package that adds an operator, with what it says of it; None if no installed package does."""
    for point in entry_points(group=GROUP, name=target.namespace):
        for item in _operators(point):
            if item.call is target:
                return package_of(point), item
    return None


def installed_state() -> tuple[tuple[str, int], ...]:
    """What changes when a package is installed or removed: the folders that packages are in, with their times of change.

    What is known of outside operators is kept as long as it stays the same.
    """
    found = []
    for folder in sys.path:
        try:
            found.append((folder, os.stat(folder or ".").st_mtime_ns))
        except OSError:
            continue
    return tuple(found)


def normalized(package: str) -> str:
    """A package's name as indexes compare it: lower case, with `-` for any run of `-`, `_` and `.`."""
    return re.sub(r"[-_.]+", "-", package).lower()


def package_of(point: EntryPoint) -> str:
    """The name of the package that an entry point belongs to, as indexes compare it."""
    return normalized(point.dist.name) if point.dist is not None else ""


@cache
def _operators(point: EntryPoint) -> tuple[Operator, ...]:
    where = f"entry point {point.name!r} of package {package_of(point)!r} in group {GROUP!r}"
    try:
        loaded = point.load()
    except (ImportError, AttributeError) as error:
        raise InputError(f"{where} cannot be loaded: {error}") from error
    found = loaded if isinstance(loaded, tuple) else (loaded,)
    for item in found:
        if not isinstance(item, Operator):
            raise InputError(
                f"{where} gives a {type(item).__name__}: expected bmgraph.api.Operator, or a tuple of them"
            )
        if not is_outside(item.call) or item.call.namespace != point.name:
            raise InputError(
                f"{where} gives {item.call}: expected an overload of an operator in the namespace that the entry point is named "
                f"after, such as torch.ops.{point.name}.round.default, and not in one of torch or bmgraph"
            )
        if item.call._schema.is_mutable:
            raise InputError(
                f"{where} gives {item.call}, which writes in place: a program's operators are pure"
            )
    return found
