"""Where the parameters of a step live: which tensor holds them, split over ranks or whole, in which dtype and on which device.

The value of a trained tensor, its gradient and its optimizer state are three things with a place each:

| | value | gradient | state |
|---|---|---|---|
| one rank, ZeRO 0 | whole | whole | whole |
| ZeRO 1 | whole | whole | split |
| ZeRO 2 | whole | split | split |
| ZeRO 3 | split | split | split |
| storage in bf16 with float32 masters | bf16 | any | float32 |
| offloaded optimizer | device | device | host, or a file |

The dtype of a place is that of storage; what the step computes in is said by its graph, which casts what it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

import torch

from bmgraph.distributed.process_group import Ranks
from bmgraph.errors import InputError
from bmgraph.ir.tensor_spec import type_text
from bmgraph.utils.finite import is_finite
from bmgraph.utils.stored_tensor import copy_elements, source_of


@dataclass(frozen=True)
class Piece:
    """The position of one parameter in a flat tensor; `offset` counts elements."""

    name: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Place:
    """What each rank holds of some parameters.

    `packed`: the parameters lie flat in one tensor, in the order of `pieces`, padded with zeros to a multiple of `ranks`;
    otherwise there is one parameter, in its own shape. `split`: rank r holds only the elements [r * share, (r + 1) * share)
    of a packed tensor; `share` is a multiple of `align`, so that a table can be split between its rows. `folder`: it lies in a memory-mapped file there, which only an optimizer's state may.
    """

    pieces: tuple[Piece, ...]
    dtype: torch.dtype
    device: torch.device
    packed: bool = False
    ranks: int = 1
    split: bool = False
    align: int = 1
    folder: str = ""

    @staticmethod
    def whole(name: str, tensor: torch.Tensor) -> Place:
        """The place of a tensor that every rank holds in its own shape."""
        return Place((Piece(name, tuple(tensor.shape)),), tensor.dtype, tensor.device)

    @staticmethod
    def pack(tensors: Iterable[tuple[str, torch.Tensor]], ranks: int, split: bool = True) -> Place:
        """One flat place for parameters by name, which must have one dtype and one device."""
        pieces: list[Piece] = []
        offset = 0
        kinds = set()
        for name, tensor in tensors:
            pieces.append(Piece(name, tuple(tensor.shape), offset))
            offset += tensor.numel()
            kinds.add((tensor.dtype, tensor.device))
        ((dtype, device),) = kinds
        return Place(tuple(pieces), dtype, device, True, ranks, split)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, in order."""
        return tuple(piece.name for piece in self.pieces)

    @property
    def size(self) -> int:
        """Number of elements of all parameters, without padding."""
        return sum(piece.size for piece in self.pieces)

    @property
    def share(self) -> int:
        """Number of elements of a packed tensor that belong to each rank, with padding."""
        return -(-self.size // (self.ranks * self.align)) * self.align

    @property
    def padding(self) -> int:
        """Number of elements at the end of a packed tensor that belong to no parameter."""
        return self.ranks * self.share - self.size

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor that a rank holds."""
        if not self.packed:
            return self.pieces[0].shape
        return (self.share if self.split else self.ranks * self.share,)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor that a rank holds."""
        return prod(self.shape) * self.dtype.itemsize

    def take(self, rank: int, value: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """A new tensor with what a rank holds, without data if the parameters have none; `value` returns a whole
        parameter by name.

        Of parameters that are in files no more is read. Raises InputError where what is read is not finite.
        """
        if not self.packed:
            return value(self.pieces[0].name).detach().to(self.device, self.dtype).clone()
        begin = rank * self.share if self.split else 0
        one = value(self.pieces[0].name)
        like = one if source_of(one) is None else torch.empty(0)
        held = like.new_zeros(self.shape, dtype=self.dtype, device=self.device)
        end = begin + held.numel()
        for piece in self.pieces:
            first, last = max(begin, piece.offset), min(end, piece.offset + piece.size)
            if first < last:
                part, tensor = held[first - begin : last - begin], value(piece.name)
                copy_elements(tensor, first - piece.offset, part)
                if source_of(tensor) is not None and not is_finite(part):
                    raise InputError(
                        f"parameter {piece.name!r} holds NaN or infinity: train from valid weights"
                    )
        return held

    def join(self, held: torch.Tensor, ranks: Ranks) -> dict[str, torch.Tensor]:
        """The whole parameters by name of the tensor that a rank holds; those of a packed one are views. Collective if
        it is split."""
        if not self.packed:
            return {self.pieces[0].name: held}
        flat = ranks.gather(held) if self.split else held
        return {
            piece.name: flat[piece.offset : piece.offset + piece.size].view(piece.shape)
            for piece in self.pieces
        }

    def chunk(self, held: torch.Tensor, rank: int) -> torch.Tensor:
        """The part of a whole packed tensor, as a view, that a rank would hold of it if it were split."""
        assert self.packed
        assert not self.split
        return held.narrow(0, rank * self.share, self.share)

    def __str__(self) -> str:
        part = f"1/{self.ranks} " if self.split else ""
        return f"{part}{type_text(self.dtype, self.shape)}"


@dataclass(frozen=True)
class Update:
    """How a trained tensor is updated: the places of its gradient, as the step returns it, and of its optimizer state.

    The place of its value is in `StepProgram.places`. All three hold the same elements in the same order. A state that is
    whole needs a value and a gradient that are whole.
    """

    gradient: Place
    state: Place
