"""Measures independently how much memory a training step holds for parameters, in any form."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WRITES = ("copy_", "allgather")
"""Operators that fill a buffer, their first argument, with what they read: a gathered bucket begins with a rank's own share."""


class LiveParameters(TorchDispatchMode):
    """Counts the live bytes of tensors derived from parameters alone: gathered, dequantized, transposed, ...

    The result of a call counts when all tensors that it reads do; memory counts once (by its address), however many views it
    has, and as long as the buffer exists, also when it waits to be used again. `most`: the peak, including what each rank
    holds permanently; `most_dequantised`: how many dequantized weights were alive at once; `gathered`: the bytes of each
    all-gather.
    """

    def __init__(self, held: list[torch.Tensor]) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}
        self._dequantised: set[int] = set()
        self._held = held
        self.most = self.most_dequantised = 0
        self.gathered: list[int] = []
        for tensor in held:
            self._add(tensor, "")

    def _add(self, tensor: torch.Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        if "dequantize" in name:
            self._dequantised.add(key)
        if any(key in name for key in WRITES):
            self.gathered.append(storage.nbytes())
        weakref.finalize(storage, self._remove, key)
        self.most = max(self.most, sum(self._alive.values()))
        self.most_dequantised = max(self.most_dequantised, len(self._dequantised))

    def _remove(self, key: int) -> None:
        self._alive.pop(key, None)
        self._dequantised.discard(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        written = args[0] if any(key in str(func) for key in WRITES) else None
        sources = args if written is None else args[1:]
        read = [leaf for leaf in tree_leaves((sources, kwargs)) if isinstance(leaf, torch.Tensor)]
        made_of_parameters = bool(read) and all(
            leaf.untyped_storage().data_ptr() in self._alive for leaf in read
        )
        result = func(*args, **(kwargs or {}))
        if made_of_parameters:
            for leaf in tree_leaves(result if written is None else written):
                if isinstance(leaf, torch.Tensor):
                    self._add(leaf, str(func))
        return result
