"""Writes a file that a command was asked for: whole or not at all, in the place of nothing or of a regular file."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from bmgraph.errors import InputError
from bmgraph.serialize.aside import folder_aside, remove_left_behind
from bmgraph.serialize.bundle import MANIFEST


def check_output(path: Path) -> None:
    """Raise InputError, before any work, unless a file can stand at a path: nothing is there yet, or a regular file."""
    target = Path(os.path.realpath(path))
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        if not target.parent.is_dir():
            raise InputError(f"{path} cannot be written: there is no folder {target.parent}") from None
        return
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file, but a device, pipe or socket"
        raise InputError(f"{path} is {what}: give the name of a file, which is replaced if it is there")


def check_output_folder(path: Path) -> None:
    """Raise InputError, before any work, unless a bundle can stand at a path: nothing, an empty folder or a bundle is there."""
    try:
        if not path.exists():
            return
        replaced = path.is_dir() and ((path / MANIFEST).is_file() or not any(path.iterdir()))
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
    if not replaced:
        what = "a folder with other contents" if path.is_dir() else "no folder"
        raise InputError(f"{path} is {what}: give a new name, or a bundle, which is replaced")


def write_output(path: Path, write: Callable[[Path], object]) -> None:
    """Have a file written aside and put it in its place, with the rights of the file that it replaces, or of a new one.

    Raises InputError, and leaves what was there, if that fails.
    """
    check_output(path)
    target = Path(os.path.realpath(path))
    try:
        with folder_aside(target) as aside:
            made = aside / "output"
            write(made)
            if target.exists():
                shutil.copymode(target, made)
            else:
                mask = os.umask(0)
                os.umask(mask)
                made.chmod(0o666 & ~mask)
            os.replace(made, target)
        remove_left_behind(target)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}; nothing was changed") from error
