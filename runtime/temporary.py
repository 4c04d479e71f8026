"""Private folders of unsaved engines: deleted with the engine, by the process that made them alone."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bmgraph.utils.locked_folder import LockedFolder, remove_abandoned

PREFIX = "bmgraph-engine-"


@contextmanager
def folder_for_engine() -> Iterator[LockedFolder]:
    """A new folder to build an engine in: deleted if that fails, else by `delete_with`.

    Those that killed processes of this user left are removed first.
    """
    place = Path(tempfile.gettempdir())
    remove_abandoned(place, PREFIX)
    folder = LockedFolder(place, PREFIX)
    try:
        yield folder
    except BaseException:
        folder.delete()
        raise


def delete_with(owner: object, folder: LockedFolder) -> None:
    """Delete a folder when `owner` is deleted, or this process exits; a forked child's exit leaves it alone."""
    weakref.finalize(owner, folder.delete)
