"""Private folders of unsaved engines: deleted with the engine, by the process that made them alone."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path


def temporary_folder() -> Path:
    """A new folder for an unsaved engine, which `delete_with` deletes with it."""
    return Path(tempfile.mkdtemp(prefix="bmgraph-"))


def delete_with(owner: object, folder: Path) -> None:
    """Delete a folder when `owner` is deleted, or this process exits; a forked child's exit leaves it alone."""
    weakref.finalize(owner, _delete, str(folder), os.getpid())


def _delete(folder: str, maker: int) -> None:
    if os.getpid() == maker:
        shutil.rmtree(folder, ignore_errors=True)
