"""A folder of checkpoints, one for each step that was saved: the newest whole one, and the last few that are kept."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bmgraph.errors import BmgraphError, BundleError, InputError
from bmgraph.serialize.bundle import read_bundle

if TYPE_CHECKING:
    from bmgraph.runtime.training.trainer import Trainer

_NAME = re.compile(r"step-(\d{8,16})\Z")


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def saved_steps(folder: Path) -> list[int]:
    """The steps of which a folder holds checkpoints, in order; none if there is no such folder."""
    if not folder.is_dir():
        return []
    found = (_NAME.match(name) for name in os.listdir(folder))
    return sorted(int(match[1]) for match in found if match)


def resume_newest(trainer: Trainer, folder: Path, tell: Callable[[str], None]) -> Path | None:
    """Load the newest checkpoint of a folder that is whole, and tell of damaged ones; None if there is none. Collective.

    Raises BundleError for a whole one that does not fit the trainer.
    """
    ranks = trainer.state.ranks
    found = ranks.broadcast_text(" ".join(map(str, reversed(saved_steps(folder)))))
    for step in map(int, found.split()):
        path = checkpoint_path(folder, step)
        try:
            trainer.load(path)
        except BmgraphError:  # where only other ranks found the damage, theirs is of this kind
            damage = ranks.broadcast_text(_damage(path) if ranks.rank == 0 else "")
            if not damage:
                raise
            tell(f"{path} is skipped, since it is damaged: {damage}")
            continue
        return path
    return None


def check_continues(trainer: Trainer, folder: Path) -> None:
    """Raise InputError, on all ranks, if a folder holds later checkpoints than this trainer's step: of an earlier run, whose
    files would be mixed with those of this one."""
    with trainer.state.ranks.on_rank0() as first:
        later = [step for step in saved_steps(folder) if step > trainer.steps] if first else []
        if later:
            raise InputError(
                f"{folder} holds checkpoints of an earlier run, up to step {later[-1]}: go on from it with "
                'resume="auto", or save to another folder'
            )


def keep_last(folder: Path, count: int, best: int | None = None) -> None:
    """Delete the checkpoints of a folder except for the last `count` and that of the step `best`; not collective."""
    for step in saved_steps(folder)[:-count]:
        if step == best:
            continue
        path = checkpoint_path(folder, step)
        doomed = (
            folder / f".deleted-{path.name}"
        )  # a killed process leaves no half of a checkpoint under its name
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _damage(path: Path) -> str:
    """What is wrong with the files of a checkpoint; empty if they are whole."""
    try:
        read_bundle(path)
    except BundleError as error:
        return str(error)
    return ""
