"""Where parameters lie when ranks share them: end to end in one flat tensor, padded and cut evenly."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True)
class Piece:
    """One parameter within a flat tensor: `offset` counts elements."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """How many elements it has."""
        return prod(self.shape)


@dataclass(frozen=True)
class Flat:
    """Parameters of one dtype, end to end; rank r of `ranks` holds elements r * share to (r + 1) * share."""

    pieces: tuple[Piece, ...]
    dtype: torch.dtype
    ranks: int

    @staticmethod
    def of(tensors: Iterable[tuple[str, torch.Tensor]], ranks: int) -> Flat:
        """The layout of these parameters, which have one dtype."""
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
        """Elements without padding."""
        return sum(piece.size for piece in self.pieces)

    @property
    def share(self) -> int:
        """Elements that a rank holds, padding included."""
        return -(-self.size // self.ranks)

    @property
    def padding(self) -> int:
        """Elements at the end that belong to no parameter."""
        return self.ranks * self.share - self.size

    def cut(self, rank: int, value: Callable[[str], torch.Tensor], device: torch.device) -> torch.Tensor:
        """A rank's share [share], a copy; `value` gives the whole parameters, one at a time."""
        begin, end = rank * self.share, (rank + 1) * self.share
        shard = torch.zeros(self.share, dtype=self.dtype, device=device)
        for piece in self.pieces:
            first, last = max(begin, piece.offset), min(end, piece.offset + piece.size)
            if first < last:
                flat = value(piece.name).detach().reshape(-1)
                shard[first - begin : last - begin] = flat[first - piece.offset : last - piece.offset]
        return shard

    def join(self, whole: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parameters of a whole flat tensor [ranks * share], as views of it."""
        return {
            piece.name: whole[piece.offset : piece.offset + piece.size].view(piece.shape)
            for piece in self.pieces
        }
