"""Specs of the inputs and outputs of a program or an engine: names, dtypes, shapes and ranges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bmgraph.ir.input_kind import InputKind

Dim = int | str
"""A size: a number if it is fixed, otherwise a name (`batch`) or an expression of names (`past + sequence`)."""

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
    torch.uint16: "u16", torch.uint32: "u32", torch.uint64: "u64",
    torch.bool: "bool", torch.complex64: "c64", torch.complex128: "c128",
    torch.float8_e4m3fn: "f8e4m3fn", torch.float8_e5m2: "f8e5m2",
    torch.float8_e4m3fnuz: "f8e4m3fnuz", torch.float8_e5m2fnuz: "f8e5m2fnuz",
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[Dim, ...]
    names: tuple[str, ...] = ()
    """Names of the values 1, 2, ... of a categorical input, "" for one that is free. A caller may give names, or None for 0,
    instead of indices; an omitted input is 0 for all rows."""
    values: tuple[int, int | None] | None = None
    """The smallest and the largest value of an input that is looked up in tables, such as token ids; None in the place of
    the largest if it is not known. None if nothing is known."""
    kind: InputKind | None = None
    """What an input holds; None for outputs, and where nobody has looked."""

    def __str__(self) -> str:
        names = f" {{{', '.join(filter(None, self.names))}}}" if self.names else ""
        return f"{self.name}: {type_text(self.dtype, self.shape)}{names}"


@dataclass(frozen=True)
class Range:
    """The sizes that a dynamic dimension may take, both ends included; `high` is None if there is no upper bound."""

    low: int = 1
    high: int | None = None


def row_sizes(inputs: Sequence[TensorSpec]) -> frozenset[Dim]:
    """The sizes that are the first of inputs and no other one: the numbers of rows, whatever they are called."""
    later = {dim for spec in inputs for dim in spec.shape[1:]}
    return frozenset(dim for spec in inputs for dim in spec.shape[:1] if isinstance(dim, str)) - later


def graph_output_names(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> list[str]:
    """The names of the outputs in an engine's graph, in which no input and output may share one.

    An output whose name is taken, such as an input that is returned, gets `output.` in front.
    """
    taken = {spec.name for spec in inputs}
    names = []
    for spec in outputs:
        name = spec.name
        while name in taken:
            name = f"output.{name}"
        taken.add(name)
        names.append(name)
    return names


def type_text(dtype: torch.dtype, shape: tuple[Dim, ...]) -> str:
    """A dtype and shape as text, such as `f32[batch, 384]`."""
    return f"{DTYPE_NAMES.get(dtype, str(dtype).removeprefix('torch.'))}[{', '.join(map(str, shape))}]"
