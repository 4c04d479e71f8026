"""A folder with a teacher's values for batches: what was computed once is read in the next epoch, or by the next run.

One safetensors file for each batch, under a name that follows from the teacher, from what is asked of it and from the batch.
Nothing in it is unpickled or run.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from bmgraph.errors import BundleError, InputError, ResourceError
from bmgraph.passes.distill.teacher import Teacher
from bmgraph.serialize.opened import open_regular_file
from bmgraph.serialize.safetensors_io import read_tensors, write_tensors
from bmgraph.utils.digest import digest
from bmgraph.verify.reference_outputs import Batch

SUFFIX = ".teacher.safetensors"
"""Ends the names of its files; others in the folder are left alone, and do not count."""

CHECKSUM = "sha256"
"""The tensor u8[32] of a file that holds the sha256 of all others."""

FORMAT = "1"

Fits = Callable[[Mapping[str, torch.Tensor]], object]
"""Raises InputError for values of the teacher that the student cannot be compared with."""


class TeacherCache:
    """Gives a teacher's values for batches, from a folder where it has them; what is new is written there.

    `identity` says what computes the values, `limit` how many bytes of files the folder may hold: what does not fit is computed
    each time, which is told once. Raises ResourceError for what is no folder that can be written to.
    """

    def __init__(self, folder: str | os.PathLike[str], teacher: Teacher, identity: str, limit: int) -> None:
        self._folder, self._teacher, self._limit = Path(folder), teacher, limit
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._held = sum(item.lstat().st_size for item in self._folder.glob(f"*{SUFFIX}"))
        except OSError as error:
            raise ResourceError(
                f"the cache of the teacher's values cannot be a folder at {self._folder}: {error}"
            ) from error
        text = "" if teacher.program is None else str(teacher.program)
        self._identity = digest([FORMAT, identity, text, [str(spec) for spec in teacher.outputs]])
        self._full = False

    def values(self, batch: Batch, names: set[str], fits: Fits) -> dict[str, torch.Tensor]:
        """The teacher's values of these names for a batch; a file that is not whole, or does not fit, is made anew."""
        ordered = sorted(names)
        given = {spec.name: batch[spec.name] for spec in self._teacher.inputs if spec.name in batch}
        file = self._folder / f"{digest([self._identity, ordered, given])}{SUFFIX}"
        found = self._read(file, ordered, fits) if os.path.lexists(file) else None
        if found is None:
            computed = self._teacher.values(batch, names)
            found = {name: computed[name].detach() for name in ordered}
            self._write(file, list(found.values()))
        return found

    def _read(self, file: Path, names: list[str], fits: Fits) -> dict[str, torch.Tensor] | None:
        """The values of a file; None, with a warning, where it cannot be used."""
        try:
            opened = open_regular_file(file)
            if opened.status.st_size > self._limit:
                raise BundleError(f"{file} is larger than the whole cache may be")
            tensors = read_tensors(opened)
            held = [tensors.get(str(place)) for place in range(len(names))]
            values = [item for item in held if item is not None]
            checksum = tensors.get(CHECKSUM)
            if len(values) < len(names) or len(tensors) != len(names) + 1 or checksum is None:
                raise BundleError(f"{file} does not hold the {len(names)} tensors that are asked for")
            if not torch.equal(checksum, _checksum(values)):
                raise BundleError(f"{file} does not hold what was written: its checksum differs")
            found = dict(zip(names, values))
            fits(found)
        except (BundleError, InputError, OSError) as error:
            warnings.warn(f"the teacher's values are computed again: {error}", stacklevel=2)
            return None
        return found

    def _write(self, file: Path, values: list[torch.Tensor]) -> None:
        """Keep values, whole or not at all, as long as there is room."""
        size = sum(item.nbytes for item in values)
        try:
            former = file.lstat().st_size if os.path.lexists(file) else 0
            if self._held - former + size > self._limit:
                if not self._full:
                    warnings.warn(
                        f"the cache of the teacher's values at {self._folder} is full ({self._limit:,} bytes): what is not in it "
                        "is computed each time; raise cache_limit, or use fewer batches",
                        stacklevel=2,
                    )
                self._full = True
                return
            if file.is_symlink():
                file.unlink()  # never written through
            held = [item.contiguous().cpu() for item in values]
            named = {str(place): item for place, item in enumerate(held)}
            write_tensors(file, {**named, CHECKSUM: _checksum(held)})
            self._held += file.lstat().st_size - former
        except OSError as error:
            raise ResourceError(
                f"the cache of the teacher's values cannot be written at {self._folder}: {error}"
            ) from error


def _checksum(values: list[torch.Tensor]) -> torch.Tensor:
    """sha256 u8[32] of tensors with their types and shapes."""
    return torch.frombuffer(bytearray(hashlib.sha256(digest(values).encode()).digest()), dtype=torch.uint8)
