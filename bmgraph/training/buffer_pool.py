"""Flat buffers that are used again once nothing reads them: a fresh buffer costs a page fault for each of its pages."""

from __future__ import annotations

import torch

from bmgraph.utils.torch_internals import readers_of_storage, unowned


class BufferPool:
    """Buffers on a CPU, handed out while no tensor views them; on other devices torch's allocator keeps what is freed.

    It never holds more bytes than were in use at once, or than two of the largest buffers: beyond, buffers that wait are let
    go for a new one.
    """

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._unowned: dict[int, torch.Tensor] = {}
        """By the key of a buffer's storage: the same memory, without being a reader of it."""
        self._most = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def storages(self) -> set[int]:
        """The keys of the storages of all buffers."""
        return {buffer.untyped_storage()._cdata for buffer in self._buffers}

    def take(self, count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An uninitialised tensor [count]; its memory returns to the pool when it and all its views are gone."""
        if device.type != "cpu" or not count:
            return torch.empty(count, dtype=dtype, device=device)
        size = count * dtype.itemsize
        free = [buffer for buffer in self._buffers if not readers_of_storage(buffer)]
        fitting = [buffer for buffer in free if buffer.nbytes == size]
        if fitting:
            buffer = fitting[0]
        else:
            in_use = self.nbytes - sum(buffer.nbytes for buffer in free)
            self._most = max(self._most, in_use + size, 2 * size)
            self._let_go(free, size)
            buffer = torch.empty(size, dtype=torch.uint8)
            self._buffers.append(buffer)
        return buffer[:size].view(dtype)

    def lent(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor for a backend to write to: it is no reader of its buffer, if it lies in one.

        Threads of gloo hold their tensors for a moment after the wait has ended: their buffer would seem to be in use, and
        another would be made. The caller holds `tensor` until the backend has ended.
        """
        key = tensor.untyped_storage()._cdata
        buffer = next((item for item in self._buffers if item.untyped_storage()._cdata == key), None)
        if buffer is None:
            return tensor
        same = self._unowned.setdefault(key, unowned(buffer)).view(tensor.dtype)
        return same.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _let_go(self, free: list[torch.Tensor], more: int) -> None:
        """Free unused buffers, the smallest first, until `more` bytes fit."""
        for buffer in sorted(free, key=lambda item: item.nbytes):
            if self.nbytes + more <= self._most:
                return
            self._buffers = [other for other in self._buffers if other is not buffer]
            self._unowned.pop(buffer.untyped_storage()._cdata, None)
