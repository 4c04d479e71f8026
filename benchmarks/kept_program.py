"""A program in training that is kept in a folder after each chunk of steps, so that a stopped run goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import bmgraph as bg


def steps_of(folder: Path) -> int | None:
    """The number of steps of the program that is kept; None without one."""
    return max(
        (int(item.name) for item in folder.glob("[0-9]*") if (item / "manifest.json").exists()), default=None
    )


def kept(folder: Path) -> Any:
    """The program that is kept."""
    return bg.load(folder / str(steps_of(folder)))


def keep(program: Any, folder: Path, steps: int) -> None:
    """Keep a program after so many steps, in the place of the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    program.save(str(folder / str(steps)))
    for old in folder.iterdir():
        if old.name != str(steps):
            shutil.rmtree(old)
