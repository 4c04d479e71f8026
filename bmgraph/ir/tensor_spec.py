"""Named inputs and outputs of a program or an engine: dtypes and shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Dim = int | str
"""A size: a number where it is fixed, the name of a symbol (`batch`) or an expression of names where it is not."""

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
    torch.bool: "bool", torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """One named input or output: `shape` holds a number for a fixed size, a name for a dynamic one."""

    name: str
    dtype: torch.dtype
    shape: tuple[Dim, ...]
    names: tuple[str, ...] = ()
    """What the values 1, 2, ... of an input of integers are called: a caller may give names, or None for 0, and may leave
    the input out, which is 0 everywhere."""

    def __str__(self) -> str:
        names = f" {{{', '.join(self.names)}}}" if self.names else ""
        return f"{self.name}: {type_text(self.dtype, self.shape)}{names}"


@dataclass(frozen=True)
class Range:
    """The sizes that a dynamic dimension may take; `high` is None where nothing bounds it."""

    low: int = 1
    high: int | None = None


def type_text(dtype: torch.dtype, shape: tuple[Dim, ...]) -> str:
    """`f32[batch, 384]`."""
    return f"{DTYPE_NAMES.get(dtype, str(dtype).removeprefix('torch.'))}[{', '.join(map(str, shape))}]"
