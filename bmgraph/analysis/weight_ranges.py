"""Parts of a tensor that are weights of their own, such as the three in nn.MultiheadAttention's `in_proj_weight`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Kind, Lookup
from bmgraph.ops.traits import traits_of


@dataclass(frozen=True)
class Region:
    """A box of a tensor: for each axis (start, stop), or one index where the axis is dropped."""

    tensor: str
    axes: tuple[tuple[int, int] | int, ...]

    def name(self, shape: torch.Size) -> str:
        """Its text, such as `in_proj_weight[0:32]`; whole trailing axes are left out."""
        parts = [
            str(axis) if isinstance(axis, int) else ":" if axis == (0, size) else f"{axis[0]}:{axis[1]}"
            for axis, size in zip(self.axes, shape)
        ]
        while parts[-1] == ":":
            parts.pop()
        return f"{self.tensor}[{','.join(parts)}]"

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of the tensor, as a view."""
        return tensor[tuple(axis if isinstance(axis, int) else slice(*axis) for axis in self.axes)]

    def overlaps(self, other: Region) -> bool:
        """Whether two parts of one tensor share an element."""
        pairs = [
            ((a, a + 1) if isinstance(a, int) else a, (b, b + 1) if isinstance(b, int) else b)
            for a, b in zip(self.axes, other.axes)
        ]
        return all(max(a[0], b[0]) < min(a[1], b[1]) for a, b in pairs)


def region_of(program: Program, part: fx.Node) -> tuple[fx.Node, Region] | None:
    """The reader of the tensor that a node takes a part of, and the part; None where it does not, or where it is no box.

    The calls run on a tensor without data, whose offset and strides tell.
    """
    chain: list[fx.Node] = []
    source: Any = part
    while _takes_part(source):
        chain.append(source)
        source = source.args[0]
    if not chain or source.op != "get_attr":
        return None
    whole = torch.empty(program.tensor(str(source.target)).shape, device="meta")
    value: Any = whole
    for item in reversed(chain):
        if any(isinstance(argument, fx.Node) for argument in item.args[1:]):
            return None
        call: Any = item.target
        value = call(value, *item.args[1:], **item.kwargs)
    if not isinstance(value, torch.Tensor) or not value.numel():
        return None
    axes = _axes(whole, value)
    return None if axes is None else (source, Region(str(source.target), axes))


def _takes_part(node: fx.Node) -> bool:
    """Whether a call takes a part of a tensor that no other tensor chooses, or parts of which `getitem` takes one."""
    row = traits_of(node)
    return row.kind is Kind.SPLIT or (row.kind is Kind.SELECTION and row.lookup is Lookup.NONE)


def _axes(whole: torch.Tensor, value: torch.Tensor) -> tuple[tuple[int, int] | int, ...] | None:
    """The box of `whole`, contiguous, that the view `value` is."""
    offset, dim = value.storage_offset(), 0
    axes: list[tuple[int, int] | int] = []
    for size, stride in zip(whole.shape, whole.stride()):
        start, offset = divmod(int(offset), int(stride))
        if dim < value.dim() and value.stride(dim) == stride and value.shape[dim] <= size - start:
            axes.append((start, start + value.shape[dim]))
            dim += 1
        else:
            axes.append(start)
    return tuple(axes) if dim == value.dim() and not offset else None
