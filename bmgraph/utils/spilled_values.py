"""A table of tensors that are in memory up to a limit, and beyond it in a temporary folder."""

from __future__ import annotations

import tempfile
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from bmgraph.errors import ResourceError
from bmgraph.utils.locked_folder import LockedFolder, remove_abandoned

PREFIX = "bmgraph-values-"


class SpilledValues:
    """Values by key: tensors, or tuples and lists that hold them beside numbers.

    At most `limit` bytes of tensors are in memory; what is put beyond that is written to a folder in the one for temporary
    files (TMPDIR), which is deleted on exit. Folders that killed processes left there are removed first. A tensor comes back
    with its values and the order of its dimensions in memory; what repeats along a dimension of stride 0 is held once. `peak` is the largest number of
    bytes that were in memory, `spilled` the number written to files.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._table: dict[Hashable, Any] = {}
        self._folder: LockedFolder | None = None
        self._count = self._held = self.peak = self.spilled = 0

    def __enter__(self) -> SpilledValues:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._table.clear()
        if self._folder is not None:
            self._folder.delete()
            self._folder = None

    def put(self, key: Hashable, value: Any) -> None:
        """Keep a value. Raises ResourceError where there is no room left for files."""
        assert key not in self._table, f"{key} is there already"
        self._table[key] = pytree.tree_map(self._packed, value)

    def get(self, key: Hashable) -> Any:
        """The value of a key. Raises ResourceError where its file was changed."""
        return pytree.tree_map(_unpacked, self._table[key])

    def drop(self, key: Hashable) -> None:
        """Forget a value."""
        for item in pytree.tree_leaves(self._table.pop(key)):
            if isinstance(item, _Packed):
                if item.file is None:
                    self._held -= item.values.nbytes
                else:
                    item.file.unlink(missing_ok=True)

    def _packed(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        packed = _Packed.of(value)
        size = packed.values.nbytes
        if self._held + size > self._limit and size:
            return self._written(packed)
        self._held += size
        self.peak = max(self.peak, self._held)
        return packed

    def _written(self, packed: _Packed) -> _Packed:
        """The same, with its values in a file."""
        if self._folder is None:
            place = Path(tempfile.gettempdir())
            remove_abandoned(place, PREFIX)
            self._folder = LockedFolder(place, PREFIX)
        self._count += 1
        file = self._folder.path / str(self._count)
        values = packed.values
        try:
            values.cpu().reshape(-1).view(torch.uint8).numpy().tofile(file)
        except OSError as error:
            raise ResourceError(
                f"no room for {values.nbytes:,} bytes of values in {self._folder.path}: {error}; set TMPDIR to a larger disk"
            ) from error
        self.spilled += values.nbytes
        shape = torch.empty(values.shape, dtype=values.dtype, device="meta")
        return _Packed(shape, packed.order, packed.shape, file, values.device)


@dataclass(frozen=True)
class _Packed:
    """A contiguous tensor, of whose dimensions `order` is the order in memory; `shape` is the whole one's, with repeats.

    With a `file`, `values` is on the meta device, and the whole tensor on `device`.
    """

    values: torch.Tensor
    order: tuple[int, ...]
    shape: tuple[int, ...]
    file: Path | None
    device: torch.device

    @staticmethod
    def of(value: torch.Tensor) -> _Packed:
        """A tensor without what it repeats and without what it does not show of its storage."""
        once = value.detach()
        for axis, (size, stride) in enumerate(zip(value.shape, value.stride())):
            if size > 1 and stride == 0:
                once = once.narrow(axis, 0, 1)
        strides = once.stride()
        order = sorted(range(once.dim()), key=lambda axis: -strides[axis])
        packed = once.permute(order).contiguous()
        if packed.untyped_storage().nbytes() > packed.nbytes:
            packed = packed.clone()
        return _Packed(packed, tuple(order), tuple(value.shape), None, value.device)


def _unpacked(item: Any) -> Any:
    if not isinstance(item, _Packed):
        return item
    values = item.values if item.file is None else _read(item)
    back = sorted(range(len(item.order)), key=lambda axis: item.order[axis])
    return values.permute(back).expand(item.shape)


def _read(item: _Packed) -> torch.Tensor:
    assert item.file is not None
    try:
        data = np.fromfile(item.file, dtype=np.uint8)
    except OSError as error:
        raise ResourceError(
            f"values that were written to {item.file} cannot be read again: {error}"
        ) from error
    if data.nbytes != item.values.nbytes:
        raise ResourceError(f"{item.file} was changed while its values were needed")
    return torch.from_numpy(data).view(item.values.dtype).reshape(item.values.shape).to(item.device)
