"""The record of each pass in a program's history, with what replay needs to repeat and compare it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist

VERSION = "@"
"""Between the name of a pass or of a target and its version, where that is not the first."""


@dataclass(frozen=True)
class Cost:
    """The size of a program: number of parameters, their bytes, and floating-point operations on the example batch."""

    parameters: int
    bytes: int
    flops: int


@dataclass(frozen=True)
class Edit:
    """A site that a pass changed or declined; `what` says how or why.

    A site names a tensor, or a module with all its tensors; `tensors` are others that changed with it.
    """

    site: str
    what: str
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """One run of a pass.

    `drift` is the change of the outputs (of a step: of its loss and gradients) by this pass alone, `cumulative` the change
    since the captured model, or the traced step (relative L2); both are None if nothing was compared. `compared` names the
    inputs that were compared.
    """

    text: str
    effect: str
    edits: tuple[Edit, ...] = ()
    declined: tuple[Edit, ...] = ()
    drift: float | None = None
    cumulative: float | None = None
    cosine: float | None = None
    compared: str = "not compared"
    before: Cost | None = None
    after: Cost | None = None
    provides: tuple[str, ...] = ()
    resources: Mapping[str, str] = field(default_factory=dict)
    """Name of a resource -> digest of the contents that the pass read."""
    inputs: tuple[str, ...] = ()
    """Inputs that the pass added to the program."""
    within: str = ""
    """The pass that ran this one; empty if the user asked for it."""
    stage: str = "model"
    """What the pass rewrote: "model" or "step"."""
    target: str = "torch"
    """The name of the target that the pass ran for, with its version unless that is the first."""
    machine: Mapping[str, str] = field(default_factory=dict)
    chosen_by: str = ""
    """The pass that searched and chose this one; empty if the user named it."""
    saves: bool = False
    """Whether the pass is meant to make the program smaller or faster: the report says where it did neither."""

    def as_json(self) -> dict[str, object]:
        """The record as JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Record:
        """The inverse of `as_json`; raises TypeError or KeyError for data of another form."""
        values = dict(data)
        for key in ("edits", "declined"):
            values[key] = tuple(
                Edit(str(item["site"]), str(item["what"]), tuple(map(str, item.get("tensors", ()))))
                for item in values.get(key, ())
            )
        for key in ("before", "after"):
            if values.get(key) is not None:
                values[key] = Cost(
                    **{name: int(values[key][name]) for name in ("parameters", "bytes", "flops")}
                )
        for key in ("provides", "inputs"):
            values[key] = tuple(map(str, values.get(key, ())))
        values["target"] = str(values.get("target", "torch"))
        values["chosen_by"] = str(values.get("chosen_by", ""))
        values["saves"] = bool(values.get("saves", False))
        values["stage"] = str(values.get("stage", "model"))
        return Record(**values)


def machine() -> dict[str, str]:
    """The environment that bit-equal replay depends on: processor, versions, threads, ranks."""
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return {
        "processor": _processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "ranks": str(ranks),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
