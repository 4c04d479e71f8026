"""Predicts the memory that a run takes beside weights, by running it on tensors without data."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bmgraph.utils.torch_internals import TorchDispatchMode


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, counts the bytes of the storages that calls make and that some tensor still lies in; `peak` is the most.

    What lies in the storages of `others` is not counted.
    """

    def __init__(self, others: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._others = {tensor.untyped_storage()._cdata for tensor in others.values()}
        self._live: dict[int, tuple[int, list[weakref.ref[torch.Tensor]]]] = {}
        self.peak = 0
        self.inside = 0
        """Bytes that the call that is about to run takes inside, beside its result."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in pytree.tree_leaves(result):
            if isinstance(item, torch.Tensor):
                self._add(item)
        self._live = {
            key: (size, left)
            for key, (size, tensors) in self._live.items()
            if (left := [ref for ref in tensors if ref() is not None])
        }
        self.peak = max(self.peak, self.inside + sum(size for size, _ in self._live.values()))
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._others:
            return
        _size, tensors = self._live.get(key, (0, []))
        self._live[key] = int(storage.nbytes()), [*tensors, weakref.ref(tensor)]
