"""Layout of sharded parameters: flattened, concatenated, padded and split evenly over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True)
class Piece:
    """The position of one parameter in a flat tensor; `offset` counts elements."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Flat:
    """Parameters of one dtype, concatenated; rank r of `ranks` holds the elements [r * share, (r + 1) * share)."""

    pieces: tuple[Piece, ...]
    dtype: torch.dtype
    ranks: int

    @staticmethod
    def of(tensors: Iterable[tuple[str, torch.Tensor]], ranks: int) -> Flat:
        """The layout of parameters by name, which must have one dtype."""
        pieces: list[Piece] = []
        offset = 0
        dtypes = set()
        for name, tensor in tensors:
            pieces.append(Piece(name, tuple(tensor.shape), offset))
            offset += tensor.numel()
            dtypes.add(tensor.dtype)
        (dtype,) = dtypes
        return Flat(tuple(pieces), dtype, ranks)

    @property
    def size(self) -> int:
        """Number of elements, without padding."""
        return sum(piece.size for piece in self.pieces)

    @property
    def share(self) -> int:
        """Number of elements that each rank holds, with padding."""
        return -(-self.size // self.ranks)

    @property
    def padding(self) -> int:
        """Number of elements at the end that belong to no parameter."""
        return self.ranks * self.share - self.size

    def shard(self, rank: int, value: Callable[[str], torch.Tensor], device: torch.device) -> torch.Tensor:
        """A copy of the shard [share] of a rank, with zeros as padding; `value` returns a whole parameter by name."""
        begin, end = rank * self.share, (rank + 1) * self.share
        shard = torch.zeros(self.share, dtype=self.dtype, device=device)
        for piece in self.pieces:
            first, last = max(begin, piece.offset), min(end, piece.offset + piece.size)
            if first < last:
                flat = value(piece.name).detach().reshape(-1)
                shard[first - begin : last - begin] = flat[first - piece.offset : last - piece.offset]
        return shard

    def join(self, whole: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parameters of the flat tensor [ranks * share] by name, as views of it."""
        return {
            piece.name: whole[piece.offset : piece.offset + piece.size].view(piece.shape)
            for piece in self.pieces
        }
