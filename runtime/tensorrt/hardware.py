"""The GPU, system and TensorRT version that an engine needs, compared with this machine's."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Hardware:
    """What an engine was built for.

    library: the module that built it ("tensorrt" or "tensorrt_rtx"), of `version`. capabilities: compute capabilities of
    GPUs ("8.9"). system: operating system and processor architecture ("linux x86_64").
    """

    library: str
    version: str
    capabilities: tuple[str, ...]
    system: str

    def __str__(self) -> str:
        return f"{self.library} {self.version} on {self.system} for GPUs of compute capability {', '.join(self.capabilities)}"

    def as_json(self) -> dict[str, object]:
        """As plain strings and lists."""
        return asdict(self)

    @staticmethod
    def from_json(data: Any) -> Hardware:
        """Decode what `as_json` returned; raises KeyError or TypeError if it is not valid."""
        return Hardware(
            str(data["library"]),
            str(data["version"]),
            tuple(map(str, data["capabilities"])),
            str(data["system"]),
        )


def this_system() -> str:
    """The operating system and processor architecture of this machine ("linux x86_64")."""
    return f"{platform.system()} {platform.machine()}".lower()


def this_capability() -> str:
    """The compute capability of this machine's GPU; empty without one."""
    import torch

    if not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def misfit(built: Hardware) -> str:
    """Why an engine cannot run on this machine; empty if it can."""
    difference = _difference(built)
    if not difference:
        return ""
    return f"the engine was built by {built}; {difference}: run it on such hardware, or compile again for this machine"


def _difference(built: Hardware) -> str:
    """The first thing in which this machine differs; empty if none does."""
    capability = this_capability()
    if not capability:
        return "this machine has no CUDA GPU"
    if capability not in built.capabilities:
        return f"this machine's GPU has {capability}"
    if this_system() != built.system:
        return f"this machine is {this_system()}"
    try:
        found = str(import_module(built.library).__version__)
    except (ImportError, OSError):
        return f"{built.library} is not installed here"
    return "" if found == built.version else f"this machine has {built.library} {found}"
