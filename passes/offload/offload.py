"""Offload: keep the optimizer's state on the host or, where the step runs there, in files (Ren et al. 2021)."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from bmgraph.errors import InputError
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import FINAL, Effect, StepPass
from bmgraph.training.step_program import StepProgram

NOT_BUILT = ("activations", "parameters")


@dataclass(frozen=True, repr=False)
class Offload(StepPass):
    """Keep the optimizer's state, and master weights that are copies, outside of the memory that the step computes in.

    On a GPU they lie in the host's memory, and updates run there. On the CPU they lie in memory-mapped files in `folder` (the
    system's folder for temporary files if it is empty; on a disk, since one in memory saves nothing). The files have no
    names, so nothing is left when a process ends or is killed; they are as large as the state, and their room is taken when
    the trainer is built. Updates give the same bits as without it on the CPU.
    Goes after ZeRO; a checkpoint resumes with or without it.

    Raises InputError for what is not built ("activations", "parameters"), and for a folder that cannot be written to.
    Source: Ren et al. 2021 (ZeRO-Offload, arXiv:2101.06840).

    Example:
        >>> Offload("optimizer")
        offload{what=optimizer}
    """

    effect: ClassVar[Effect] = "exact"
    provides: ClassVar[frozenset[str]] = frozenset({"offloaded"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"offloaded", FINAL})

    what: str
    folder: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.what in NOT_BUILT:
            raise InputError(f"Offload({self.what!r}) is not built yet: Offload('optimizer') is")
        if self.what != "optimizer":
            raise InputError(f"Offload({self.what!r}): the one choice is 'optimizer'")

    def run(self, step: StepProgram, context: Context) -> StepProgram:
        """Change the places of the optimizer's states."""
        device = torch.device("cpu")
        folder = ""
        if step.device.type == "cpu":
            folder = os.path.abspath(self.folder or tempfile.gettempdir())
            if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
                raise InputError(f"folder={folder!r} is no folder that can be written to")
        where = f"in a file in {folder}" if folder else "in the host's memory"
        for name, update in step.updates.items():
            state = replace(update.state, device=device, folder=folder)
            step.updates[name] = replace(update, state=state)
            context.edited(name, f"optimizer state {state}, {where}")
        return step
