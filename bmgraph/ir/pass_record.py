"""What was done to a program: one record a pass, enough to do it again and to know that it was the same."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Cost:
    """What a program weighs: parameters, their bytes, and floating-point operations of the example batch."""

    parameters: int
    bytes: int
    flops: int


@dataclass(frozen=True)
class Edit:
    """A place that a pass changed or declined, and how or why."""

    site: str
    what: str


@dataclass(frozen=True)
class Record:
    """One pass as it ran.

    `drift` is the change by this pass alone and `cumulative` the change since the captured model (relative L2),
    None where nothing was compared; `compared` says on what.
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
    """Name of a resource -> digest of what was read of it."""
    inputs: tuple[str, ...] = ()
    """Inputs that the pass added, which the model itself does not take."""
    within: str = ""
    """The pass that ran this one, where it was not asked for by the user."""
    target: str = "torch"
    """The name of the target that the pass was run for."""
    machine: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The record as plain numbers, strings, lists and dicts."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Record:
        """The record that `as_json` wrote; raises TypeError or KeyError where it is not one."""
        values = dict(data)
        for key in ("edits", "declined"):
            values[key] = tuple(Edit(str(item["site"]), str(item["what"])) for item in values.get(key, ()))
        for key in ("before", "after"):
            if values.get(key) is not None:
                values[key] = Cost(
                    **{name: int(values[key][name]) for name in ("parameters", "bytes", "flops")}
                )
        for key in ("provides", "inputs"):
            values[key] = tuple(map(str, values.get(key, ())))
        values["target"] = str(values.get("target", "torch"))
        return Record(**values)


def machine() -> dict[str, str]:
    """What bit-equal replay depends on: processor, versions, threads, ranks."""
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
