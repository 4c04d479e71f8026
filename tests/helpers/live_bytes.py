"""Measures live bytes of storages while torch runs, by a dispatch mode: independent of the library's own simulation."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """The bytes of all storages of tensors that were `watch`ed or that calls within it made, as long as these live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.at = ""
        self._owners: Counter[int] = Counter()
        self._elsewhere: set[int] = set()

    def watch(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage.data_ptr(), storage.nbytes()
            if key in self._elsewhere:
                continue
            if not self._owners[key]:
                self.live += size
            self._owners[key] += 1
            weakref.finalize(tensor, self._drop, key, size)

    def leave_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """Do not count the storages of some tensors, which lie in files."""
        self._elsewhere |= {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def _drop(self, key: int, size: int) -> None:
        self._owners[key] -= 1
        if not self._owners[key]:
            self.live -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **dict(kwargs or {}))
        items = made if isinstance(made, (tuple, list)) else [made]
        self.watch(item for item in items if isinstance(item, torch.Tensor))
        if self.live > self.peak:
            self.peak, self.at = self.live, str(func)
        return made


def measured_peak(trainer: Any, batch: Mapping[str, torch.Tensor]) -> int:
    """The most live bytes in a step of a trainer that has made one before."""
    trainer.step(batch)
    meter = LiveBytes()
    meter.watch(trainer.state.tensors.values())
    meter.watch(batch.values())
    pools = trainer.gradients._runner.buffers
    for pool in (pools.gathered, pools.flat, pools.summed):  # idle ones are held too
        meter.watch(pool._buffers)
    for name, moments in trainer.update.moments.items():
        master = trainer.update.saved(name)[1]
        copied = [] if master is trainer.state.tensors[name] else [master]
        if trainer.state.updates[name].state.folder:
            meter.leave_out([*copied, *moments.values()])
        meter.watch([*copied, *moments.values()])
    with meter:
        trainer.step(batch)
    return meter.peak
