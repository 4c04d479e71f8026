"""Tensors whose values stay in a file until an operator asks for them.

A table of tensors (`Program.parameters`) may hold them like any others: their shape, dtype and device are known without
reading. What reads values gets an ordinary tensor, a checked copy of the file's bytes in anonymous memory: a file that is
mapped could be cut or overwritten under it.
"""

from __future__ import annotations

import hashlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from copy import copy
from math import prod
from typing import Any

import torch
from torch.utils import _pytree as pytree

BLOCK = 4 * 2**20
"""How many bytes are read at a time where a tensor is not read whole."""


class Source(ABC):
    """Where the values of a tensor are. `resident`: whether they stay in memory once an operator has asked for them."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    resident: bool

    @abstractmethod
    def blocks(self, into: memoryview | None = None, size: int = BLOCK) -> Iterator[memoryview]:
        """The bytes in order, `size` at a time: each read into its place in `into`, else into one buffer that is used again.

        Raises BundleError after the last block, so before anything may be made of them, if they are not the expected ones.
        """

    @abstractmethod
    def sample(self, begin: int, end: int) -> bytes:
        """Some of the bytes; they are not checked."""

    @abstractmethod
    def fill(self, into: memoryview, begin: int, pages: memoryview | None = None) -> None:
        """Read the bytes from `begin` on into a buffer, and no others.

        `pages` is memory that reads past the system's page cache may go through, after `bypass_cache` (`OpenedFile.part`).
        Raises BundleError if the file was changed since it was opened, as far as that can be told without reading all of it.
        """

    @property
    def read_whole(self) -> bool:
        """Whether `fill` reads all bytes, whatever it is asked for, to compare them."""
        return False

    @property
    def offset(self) -> int:
        """The place of the first byte in the file that the values are in, if this is known: reads are cut by it."""
        return 0

    def bypass_cache(self) -> str:
        """Let `fill` read past the system's page cache from now on, through its `pages`; "", or why that cannot be done."""
        return "the values are not in a file"

    def will_fill(self, begin: int, end: int) -> None:
        """Say that `fill` is going to ask for these bytes, so that reading them can begin."""
        return

    def with_residence(self, resident: bool) -> Source:
        """The same values, which stay in memory once they are read, or do not."""
        other = copy(self)
        other.resident = resident
        return other

    @property
    @abstractmethod
    def digest(self) -> str:
        """sha256 of all bytes; they are read if it is not known."""

    @property
    @abstractmethod
    def finite(self) -> bool | None:
        """Whether no value is NaN or infinite; None if that is not known."""

    @property
    def bytes(self) -> int:
        """The size of all values."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """A new tensor with the values; raises BundleError if they are not the expected ones."""
        with torch.inference_mode(False):
            tensor = torch.empty(self.shape, dtype=self.dtype)
            if tensor.numel():
                for _ in self.blocks(_bytes_of(tensor)):
                    pass
        return tensor


class CastSource(Source):
    """The values of another source in another dtype, cast as they are read."""

    resident = False

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self._source, self.shape, self.dtype = source, source.shape, dtype

    def blocks(self, into: memoryview | None = None, size: int = BLOCK) -> Iterator[memoryview]:
        """The bytes in order, cast block by block; what was read is compared after the last one."""
        narrow, wide = self._source.dtype.itemsize, self.dtype.itemsize
        begin = 0
        for block in self._source.blocks(size=max(1, size // wide) * narrow):
            found = _bytes_of(_values_of(block, self._source.dtype).to(self.dtype))
            if into is not None:
                into[begin : begin + len(found)] = found
            begin += len(found)
            yield found

    def sample(self, begin: int, end: int) -> bytes:
        """Some of the bytes, whole elements; they are not checked."""
        narrow, wide = self._source.dtype.itemsize, self.dtype.itemsize
        block = self._source.sample(begin // wide * narrow, end // wide * narrow)
        return bytes(_bytes_of(_values_of(memoryview(bytearray(block)), self._source.dtype).to(self.dtype)))

    def fill(self, into: memoryview, begin: int, pages: memoryview | None = None) -> None:
        """Read the bytes from `begin` on, whole elements, a block at a time."""
        narrow, wide = self._source.dtype.itemsize, self.dtype.itemsize
        count = BLOCK // wide
        for first in range(0, len(into) // wide, count):
            length = min(count, len(into) // wide - first)
            block = bytearray(length * narrow)
            self._source.fill(memoryview(block), (begin // wide + first) * narrow, pages)
            found = _values_of(memoryview(block), self._source.dtype).to(self.dtype)
            into[first * wide : (first + length) * wide] = _bytes_of(found)

    @property
    def read_whole(self) -> bool:
        """As the other source does."""
        return self._source.read_whole

    def bypass_cache(self) -> str:
        """As the other source does."""
        return self._source.bypass_cache()

    def will_fill(self, begin: int, end: int) -> None:
        """Say it to the other source."""
        narrow, wide = self._source.dtype.itemsize, self.dtype.itemsize
        self._source.will_fill(begin // wide * narrow, end // wide * narrow)

    @property
    def digest(self) -> str:
        """sha256 of all bytes; they are read each time."""
        state = hashlib.sha256()
        for block in self.blocks():
            state.update(block)
        return state.hexdigest()

    @property
    def finite(self) -> bool | None:
        """False where a value of the other source is NaN or infinite; else not known."""
        return False if self._source.finite is False else None


class StoredTensor(torch.Tensor):
    """A tensor whose values are in a `Source`; operators are given a tensor with its values instead.

    The values stay in memory where the source is `resident`, and where an operator wrote into them.
    """

    source: Source
    _held: torch.Tensor | None
    _last: weakref.ref[torch.Tensor] | None

    @staticmethod
    def __new__(cls, source: Source) -> StoredTensor:
        """A tensor of the source's shape and dtype, on the CPU."""
        made: StoredTensor = torch.Tensor._make_wrapper_subclass(cls, source.shape, dtype=source.dtype)  # type: ignore[attr-defined]
        made.source, made._held, made._last = source, None, None
        return made

    def __init__(self, source: Source) -> None:
        pass

    @property
    def kept(self) -> torch.Tensor | None:
        """The values, if they are in memory to stay."""
        return self._held

    def values_in_memory(self) -> torch.Tensor:
        """The values as an ordinary tensor; raises BundleError if the file was changed."""
        found = self._held
        if found is None and self._last is not None:
            found = self._last()
        if found is None:
            found = self.source.read()
            if self.source.resident:
                self._held = found
            self._last = weakref.ref(found)
        return found

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _DESCRIBES:
            return super().__torch_function__(func, types, args, dict(kwargs or {}))  # type: ignore[no-untyped-call]
        if func in _SAME:
            return args[0]
        if func == _VERSION:
            return 0 if args[0]._held is None else args[0]._held._version
        return _on_values(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # declared as a plain function, called as a class method
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _on_values(func, args, kwargs)


_DESCRIBES = frozenset(
    {
        torch.Tensor.shape.__get__, torch.Tensor.dtype.__get__, torch.Tensor.device.__get__, torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
        torch.Tensor.layout.__get__, torch.Tensor.requires_grad.__get__, torch.Tensor.nbytes.__get__,  # type: ignore[attr-defined]
        torch.Tensor.itemsize.__get__, torch.Tensor.is_leaf.__get__, torch.Tensor.grad.__get__,  # type: ignore[attr-defined,union-attr]
        torch.Tensor.is_meta.__get__, torch.Tensor.is_cuda.__get__, torch.Tensor.is_sparse.__get__,  # type: ignore[attr-defined]
        torch.Tensor.is_quantized.__get__,  # type: ignore[attr-defined]
        torch.Tensor.size, torch.Tensor.stride, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.nelement,
        torch.Tensor.element_size, torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.Tensor.is_contiguous,
        torch.Tensor.is_inference, torch.Tensor.storage_offset, torch.Tensor.__len__, torch.Tensor.get_device,
        torch.Tensor.is_signed, torch.is_floating_point, torch.is_complex, torch.numel, torch.is_tensor,
    }
)  # fmt: skip
"""Functions that ask what a tensor is, not for its values."""

_SAME = frozenset({torch.Tensor.detach, torch.Tensor.data.__get__, torch.Tensor.cpu})  # type: ignore[attr-defined]
"""Functions whose result is the tensor itself: it is on the CPU and has no gradient."""

_VERSION = torch.Tensor._version.__get__  # type: ignore[attr-defined]


def _on_values(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Any:
    """Call a function with values in the place of stored tensors; what it writes into stays in memory."""
    given: dict[int, tuple[StoredTensor, torch.Tensor, int]] = {}

    def values(item: Any) -> Any:
        if not isinstance(item, StoredTensor):
            return item
        if id(item) not in given:
            found = item.values_in_memory()
            given[id(item)] = item, found, found._version
        return given[id(item)][1]

    result = func(*pytree.tree_map(values, args), **pytree.tree_map(values, dict(kwargs or {})))
    for item, found, version in given.values():
        if found._version != version:
            item._held = found
    return result


def in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as an ordinary one, with its values."""
    return tensor.values_in_memory() if isinstance(tensor, StoredTensor) else tensor


def to_run(tensor: torch.Tensor) -> torch.Tensor:
    """What a graph that runs reads: an ordinary tensor, unless its values are not to stay in memory."""
    return in_memory(tensor) if not is_too_large(tensor) else tensor


def tensor_on(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device; what is in a file is read for another device only if that holds values."""
    if isinstance(tensor, StoredTensor) and device.type in ("cpu", "meta"):
        return (
            tensor if device.type == "cpu" else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        )
    return tensor.to(device)


def is_too_large(tensor: torch.Tensor) -> bool:
    """Whether the values of a tensor do not stay in memory: those of its program do not fit."""
    return isinstance(tensor, StoredTensor) and not tensor.source.resident


def left_in_file(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without values in memory, to be read at each use, if its values are those of a file; else itself."""
    if not isinstance(tensor, StoredTensor) or (tensor.kept is not None and tensor.kept._version):
        return tensor
    return (
        tensor
        if is_too_large(tensor) and tensor.kept is None
        else StoredTensor(tensor.source.with_residence(False))
    )


def as_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in another dtype; one whose values do not stay in memory is cast where it is read."""
    if not isinstance(tensor, StoredTensor) or tensor.source.resident:
        return tensor.to(dtype)
    return tensor if tensor.dtype == dtype else StoredTensor(CastSource(tensor.source, dtype))


def copy_elements(tensor: torch.Tensor, begin: int, into: torch.Tensor) -> None:
    """Copy the elements from `begin` on, in row-major order, into a contiguous tensor [n]; of what is in a file no others are
    read."""
    source = source_of(tensor)
    if source is None:
        into.copy_(in_memory(tensor).detach().reshape(-1)[begin : begin + len(into)])
    elif (into.dtype, into.device.type) == (source.dtype, "cpu"):
        source.fill(_bytes_of(into), begin * source.dtype.itemsize)
    else:
        for first in range(0, len(into), BLOCK):
            part = into[first : first + BLOCK]
            read = torch.empty(len(part), dtype=source.dtype)
            source.fill(_bytes_of(read), (begin + first) * source.dtype.itemsize)
            part.copy_(read)


def source_of(tensor: torch.Tensor) -> Source | None:
    """Where the values of a tensor are, if they are not in memory."""
    return tensor.source if isinstance(tensor, StoredTensor) and tensor.kept is None else None


def byte_blocks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor on any device, row by row, in blocks that hold until the next one is asked for."""
    source = source_of(tensor)
    if source is not None:
        yield from source.blocks()
        return
    tensor = in_memory(tensor)
    whole = tensor.detach() if tensor.is_contiguous() or tensor.dim() == 0 else None
    pieces = [whole] if whole is not None else tensor.detach()
    for piece in pieces:
        flat = piece.cpu().contiguous().reshape(-1)
        if flat.numel():
            yield _bytes_of(flat)


def row_blocks(tensor: torch.Tensor, size: int = BLOCK) -> Iterator[tuple[int, torch.Tensor]]:
    """A tensor [rows, ...] in blocks of rows of about `size` bytes, each with the number of its first row.

    A block holds until the next one is asked for. Where the values are in a file, they are checked after the last block.
    """
    rows = len(tensor)
    row = max(1, tensor.numel() * tensor.element_size() // max(1, rows))
    count = max(1, size // row)
    source = source_of(tensor)
    if source is None:
        whole = in_memory(tensor)
        yield from ((begin, whole[begin : begin + count]) for begin in range(0, rows, count))
        return
    for index, block in enumerate(source.blocks(size=count * row)):
        yield index * count, _values_of(block, tensor.dtype).reshape(-1, *tensor.shape[1:])


def _values_of(block: memoryview, dtype: torch.dtype) -> torch.Tensor:
    """The elements whose bytes are in a buffer, [n], as long as this holds."""
    return torch.frombuffer(block, dtype=torch.uint8).view(dtype)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data  # type: ignore[no-any-return]
