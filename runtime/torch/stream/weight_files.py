"""Puts large weights that are in memory into files, from which they are then read."""

from __future__ import annotations

import tempfile
from pathlib import Path

from bmgraph.deltas.row_tables import find_row_tables
from bmgraph.errors import BackendError
from bmgraph.ir.left_in_files import left_in_files
from bmgraph.ir.program import Program
from bmgraph.serialize.opened import open_regular_file
from bmgraph.serialize.safetensors_io import write_tensors
from bmgraph.serialize.stored_file import SMALL, stored_tensors
from bmgraph.utils.locked_folder import LockedFolder, remove_abandoned
from bmgraph.utils.stored_tensor import is_too_large

PREFIX = "bmgraph-weights-"


def files_of(program: Program) -> Program:
    """A copy of a program whose large parameters are all in files: what passes made is written to one in the folder for temporary files
    (TMPDIR), which has no name any more when this returns, and is gone with the engine.

    Raises BackendError where there is no room.
    """
    copy = left_in_files(program)
    form = find_row_tables(program)
    own = set() if form is None else {item.name for item in form.tables}
    made = {
        name: tensor
        for name, tensor in copy.parameters.items()
        if not is_too_large(tensor)
        and tensor.nbytes > SMALL
        and name not in own
        and tensor.device.type == "cpu"
    }
    if not made:
        return copy
    place = Path(tempfile.gettempdir())
    remove_abandoned(place, PREFIX)
    folder = LockedFolder(place, PREFIX)
    try:
        file = folder.path / "weights.safetensors"
        try:
            write_tensors(file, made)
        except OSError as error:
            size = sum(tensor.nbytes for tensor in made.values())
            raise BackendError(
                f"no room for {size:,} bytes of weights in {place}: {error}; set TMPDIR to a larger disk"
            ) from error
        copy.parameters |= stored_tensors(open_regular_file(file), file, resident=False)
    finally:
        folder.delete()
    return copy
