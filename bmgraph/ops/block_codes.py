"""Weights in codes of few bits, several in a byte, with one scale for each block of a row, and perhaps one zero point.

N outputs (or rows of a table), K inputs, B = ceil(K / block) blocks; `...` is nothing, or E for the weights of experts. Codes are
unsigned, low bits first, one after the other (of 3 bits, 8 codes are in 3 bytes): `code - zero` steps of their block's scale, where the zero point of all blocks is 2 ** (bits - 1) if none
are given. Zero points are codes, too, packed as densely: u8[..., N, ceil(B * bits / 8)], as MatMulNBits of ONNX Runtime reads them. The last
block of a row is filled up with zeros where `block` does not divide K. Weights that read the same input are concatenated along N,
codes, scales and zero points alike.

In Python a code is signed, i8 less 2 ** (bits - 1), and so is a zero point: without zero points it is 0.

`bmgraph::dequantize_blocks` makes a weight of its codes. `bmgraph::linear_blocks` and `bmgraph::embedding_blocks` are what
backends replace it and its reader by, where a kernel reads codes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from bmgraph.ops.quantization import quantize_blocks
from bmgraph.ops.trait_row import Traits

BITS = (2, 3, 4, 8)
"""Sizes of a code."""


def zero_code(bits: int) -> int:
    """The code of zero."""
    return int(2 ** (bits - 1))


class BlockArguments(NamedTuple):
    """The arguments of a call of `bmgraph::dequantize_blocks`."""

    codes: fx.Node
    scale: fx.Node
    bits: int
    columns: int
    zero: fx.Node | None = None

    @property
    def readers(self) -> tuple[fx.Node, ...]:
        """The nodes that give tensors: codes, scales and, where there are some, zero points."""
        return (self.codes, self.scale) if self.zero is None else (self.codes, self.scale, self.zero)


def block_arguments(call: fx.Node) -> BlockArguments:
    """The arguments of a call of `bmgraph::dequantize_blocks`, which earlier versions wrote without zero points."""
    given: Any = call.args
    return BlockArguments(*given)


def pack_codes(codes: torch.Tensor, bits: int, block: int, zero: torch.Tensor | None = None) -> torch.Tensor:
    """Codes i8[..., N, K] around 0, zero points i8[..., N, B] -> u8[..., N, B, block * bits / 8]."""
    columns = codes.shape[-1]
    count = -(-columns // block)
    filled = _filled(codes, count * block, bits)
    if zero is not None and columns % block:
        filled[..., columns:] = _filled(zero[..., -1:], 1, bits)
    return _packed(filled.reshape(*codes.shape[:-1], count, block), bits)


def pack_zeros(zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Zero points i8[..., N, B] around 0 -> u8[..., N, ceil(B * bits / 8)]."""
    count = zero.shape[-1]
    filled = _filled(zero, -(-count // 8) * 8, bits)
    return _packed(filled, bits)[..., : zero_bytes(count, bits)].contiguous()


def unpack_zeros(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse of `pack_zeros`: i8[..., N, B] with B = `count`."""
    whole = bits if 8 % bits else 1  # words have whole numbers of bytes
    filled = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % whole))
    return unpack_codes(filled.unsqueeze(-2), bits, count)


def zero_bytes(count: int, bits: int) -> int:
    """How many bytes `count` zero points take."""
    return -(-count * bits // 8)


def _filled(codes: torch.Tensor, columns: int, bits: int) -> torch.Tensor:
    """Codes i8[..., K] around 0 -> unsigned ones u8[..., `columns`], filled up with those of 0."""
    unsigned = (codes.to(torch.int16) + zero_code(bits)).to(torch.uint8)
    return torch.nn.functional.pad(unsigned, (0, columns - codes.shape[-1]), value=zero_code(bits))


def _packed(unsigned: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes u8[..., n], n a multiple of 8 -> u8[..., n * bits / 8]."""
    if 8 % bits:
        return _in_words(unsigned.reshape(*unsigned.shape[:-1], -1, 8), bits)
    parts = unsigned.reshape(*unsigned.shape[:-1], -1, 8 // bits)
    packed = parts[..., 0].clone()
    for place in range(1, 8 // bits):
        packed |= parts[..., place] << (place * bits)
    return packed


def _in_words(unsigned: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes u8[..., W, 8], 8 in a word of `bits` bytes -> u8[..., W * bits]."""
    places = torch.arange(8, device=unsigned.device) * bits
    words = (unsigned.to(torch.int64) << places).sum(-1, keepdim=True)
    held: torch.Tensor = (words >> (8 * torch.arange(bits, device=words.device))) & 255
    return held.to(torch.uint8).flatten(-2)


def unpack_codes(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The inverse of `pack_codes`: i8[..., N, K] with K = `columns`."""
    unsigned = _unsigned(packed, bits).flatten(packed.dim() - 2)[..., :columns]
    return (unsigned.to(torch.int16) - zero_code(bits)).to(torch.int8)


def block_size(packed: torch.Tensor, bits: int) -> int:
    """The number of codes in a block."""
    return int(packed.shape[-1]) * 8 // bits


def _unsigned(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """u8[..., bytes] -> u8[..., bytes, codes in a byte], or [..., words, 8 codes in a word] where bytes hold no whole number."""
    if bits == 8:
        return packed.unsqueeze(-1)
    if 8 % bits:
        split = packed.reshape(*packed.shape[:-1], -1, bits).to(torch.int32)
        words = (split << (8 * torch.arange(bits, dtype=torch.int32, device=packed.device))).sum(
            -1, keepdim=True
        )
        places = bits * torch.arange(8, device=packed.device)
        held: torch.Tensor = (words >> places) & (2**bits - 1)
        return held.to(torch.uint8)
    return torch.stack([(packed >> (place * bits)) & (2**bits - 1) for place in range(8 // bits)], dim=-1)


def _check(
    codes: torch.Tensor, scale: torch.Tensor, bits: int, columns: int, zero: torch.Tensor | None
) -> None:
    """Raise RuntimeError for arguments that do not fit each other: a file may hold any."""
    if bits not in BITS:
        raise RuntimeError(f"codes of {bits} bits: expected one of {BITS}")
    if codes.dtype != torch.uint8 or codes.dim() not in (3, 4) or scale.shape != codes.shape[:-1]:
        raise RuntimeError(
            "expected codes u8[N, B, bytes], or u8[E, N, B, bytes] of experts, and a scale for each block"
        )
    if 8 % bits and codes.shape[-1] % bits:
        raise RuntimeError(
            f"codes of {bits} bits: expected words of {bits} bytes, and a block has {codes.shape[-1]}"
        )
    if not 0 <= columns <= codes.shape[-2] * codes.shape[-1] * 8 // bits:
        raise RuntimeError(f"{columns} columns are more than the blocks hold")
    if zero is not None:
        expected = (*codes.shape[:-2], zero_bytes(codes.shape[-2], bits))
        if zero.dtype != torch.uint8 or zero.shape != expected:
            raise RuntimeError(
                f"expected zero points u8{list(expected)}, and they are {zero.dtype} of {list(zero.shape)}"
            )


def _zeros(zero: torch.Tensor | None, bits: int, scale: torch.Tensor) -> torch.Tensor | int:
    """The unsigned zero points f[..., N, B] of blocks with scales f[..., N, B]; without any, the one of all."""
    if zero is None:
        return zero_code(bits)
    return unpack_zeros(zero, bits, scale.shape[-1]).to(scale.dtype) + zero_code(bits)


@torch.library.custom_op("bmgraph::dequantize_blocks", mutates_args=())
def dequantize_blocks(
    codes: torch.Tensor, scale: torch.Tensor, bits: int, columns: int, zero: torch.Tensor | None = None
) -> torch.Tensor:
    """codes u8[..., N, B, bytes], scale f[..., N, B], zero u8[..., N, ceil(B * bits / 8)] -> f[..., N, K], K = `columns`:
    (code - zero) * scale of its block, where zero is 2 ** (bits - 1) if it is not given."""
    _check(codes, scale, bits, columns, zero)
    values = _unsigned(codes, bits).to(scale.dtype)
    zeros = _zeros(zero, bits, scale)
    values.sub_(zeros if isinstance(zeros, int) else zeros[..., None, None]).mul_(scale[..., None, None])
    return values.flatten(codes.dim() - 2)[..., :columns].contiguous()


@dequantize_blocks.register_fake
def _(
    codes: torch.Tensor, scale: torch.Tensor, bits: int, columns: int, zero: torch.Tensor | None = None
) -> torch.Tensor:
    _check(codes, scale, bits, columns, zero)
    return scale.new_empty(*codes.shape[:-2], columns)


def _save_codes(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    codes, _, bits, columns, zero = inputs
    ctx.save_for_backward(codes, zero)
    ctx.bits, ctx.columns = bits, columns


def _scale_gradient(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, None, None, None]:
    codes, zero = ctx.saved_tensors
    ones = gradient.new_ones(codes.shape[:-1])
    steps = dequantize_blocks(codes, ones, ctx.bits, ctx.columns, zero)
    filled = codes.shape[-2] * block_size(codes, ctx.bits) - ctx.columns
    moved = torch.nn.functional.pad(gradient * steps, (0, filled))
    return None, moved.reshape(*codes.shape[:-1], -1).sum(-1), None, None, None


dequantize_blocks.register_autograd(_scale_gradient, setup_context=_save_codes)


@torch.library.custom_op("bmgraph::linear_blocks", mutates_args=())
def linear_blocks(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    columns: int,
    rounded: bool,
    zero: torch.Tensor | None = None,
) -> torch.Tensor:
    """x f[..., K] times the weight of the codes, plus bias f[N] -> f[..., N].

    With `rounded` each block of x is rounded to 8 bits first (`quantize_blocks`).
    """
    given = quantize_blocks(x, block_size(codes, bits)) if rounded else x
    return torch.nn.functional.linear(given, dequantize_blocks(codes, scale, bits, columns, zero), bias)


@linear_blocks.register_fake
def _(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    columns: int,
    rounded: bool,
    zero: torch.Tensor | None = None,
) -> torch.Tensor:
    _check(codes, scale, bits, columns, zero)
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@torch.library.custom_op("bmgraph::embedding_blocks", mutates_args=())
def embedding_blocks(
    codes: torch.Tensor,
    ids: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    block: int,
    zero: torch.Tensor | None = None,
) -> torch.Tensor:
    """The rows ids i64[...] of a table f[N, K] in codes u8[N, K * bits / 8], scales f[N, B] and zero points as above -> f[..., K]."""
    flat = ids.reshape(-1)
    values = _unsigned(codes[flat], bits).flatten(1).to(scale.dtype)
    zeros, columns = _zeros(zero if zero is None else zero[flat], bits, scale[flat]), values.shape[1]
    values.sub_(zeros if isinstance(zeros, int) else zeros.repeat_interleave(block, 1)[:, :columns])
    values.mul_(scale[flat].repeat_interleave(block, 1)[:, :columns])
    return values.reshape(*ids.shape, -1)


@embedding_blocks.register_fake
def _(
    codes: torch.Tensor,
    ids: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    block: int,
    zero: torch.Tensor | None = None,
) -> torch.Tensor:
    return scale.new_empty(*ids.shape, codes.shape[1] * 8 // bits)


TRAITS: dict[Any, Traits] = {
    torch.ops.bmgraph.dequantize_blocks: Traits(),
}
"""The rows of these operators. How the dimensions of codes belong to those of the weight is not said, since a byte holds
several: what drops channels declines such weights."""
