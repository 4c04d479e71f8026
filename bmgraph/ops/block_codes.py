"""Weights in codes of few bits, several in a byte, with one scale for each block of a row.

N outputs (or rows of a table), K inputs, B = ceil(K / block) blocks. Codes are unsigned, low bits first, one after the other (of 3
bits, 8 codes are in 3 bytes): `code - 2 ** (bits - 1)` steps of their block's scale. The last block of a row is filled up with zeros where `block` does not divide K. Weights that read
the same input are concatenated along N, codes and scales alike.

`bmgraph::dequantize_blocks` makes a weight of its codes. `bmgraph::linear_blocks` and `bmgraph::embedding_blocks` are what
backends replace it and its reader by, where a kernel reads codes.
"""

from __future__ import annotations

from typing import Any

import torch

from bmgraph.ops.quantization import quantize_blocks
from bmgraph.ops.trait_row import Traits

BITS = (2, 3, 4, 8)
"""Sizes of a code."""


def zero_code(bits: int) -> int:
    """The code of zero."""
    return int(2 ** (bits - 1))


def pack_codes(codes: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """Codes i8[N, K] around 0 -> u8[N, B, block * bits / 8]."""
    count = -(-codes.shape[1] // block)
    unsigned = (codes.to(torch.int16) + zero_code(bits)).to(torch.uint8)
    filled = torch.nn.functional.pad(unsigned, (0, count * block - codes.shape[1]), value=zero_code(bits))
    if 8 % bits:
        return _in_words(filled.reshape(len(codes), count, -1, 8), bits)
    parts = filled.reshape(len(codes), count, -1, 8 // bits)
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
    """The inverse of `pack_codes`: i8[N, K] with K = `columns`."""
    return (_unsigned(packed, bits).flatten(1)[:, :columns].to(torch.int16) - zero_code(bits)).to(torch.int8)


def block_size(packed: torch.Tensor, bits: int) -> int:
    """The number of codes in a block."""
    return int(packed.shape[-1]) * 8 // bits


def _unsigned(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """u8[N, B, bytes] -> u8[N, B, bytes, codes in a byte], or [N, B, words, 8 codes in a word] where bytes hold no whole number."""
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


def _check(codes: torch.Tensor, scale: torch.Tensor, bits: int, columns: int) -> None:
    """Raise RuntimeError for arguments that do not fit each other: a file may hold any."""
    if bits not in BITS:
        raise RuntimeError(f"codes of {bits} bits: expected one of {BITS}")
    if codes.dtype != torch.uint8 or codes.dim() != 3 or scale.shape != codes.shape[:2]:
        raise RuntimeError("expected codes u8[N, B, bytes] and a scale for each block")
    if 8 % bits and codes.shape[2] % bits:
        raise RuntimeError(
            f"codes of {bits} bits: expected words of {bits} bytes, and a block has {codes.shape[2]}"
        )
    if not 0 <= columns <= codes.shape[1] * codes.shape[2] * 8 // bits:
        raise RuntimeError(f"{columns} columns are more than the blocks hold")


@torch.library.custom_op("bmgraph::dequantize_blocks", mutates_args=())
def dequantize_blocks(codes: torch.Tensor, scale: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """codes u8[N, B, bytes], scale f[N, B] -> f[N, K], K = `columns`: (code - 2 ** (bits - 1)) * scale of its block."""
    _check(codes, scale, bits, columns)
    values = _unsigned(codes, bits).to(scale.dtype)
    values.sub_(zero_code(bits)).mul_(scale[..., None, None])
    return values.flatten(1)[:, :columns].contiguous()


@dequantize_blocks.register_fake
def _(codes: torch.Tensor, scale: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    _check(codes, scale, bits, columns)
    return scale.new_empty(codes.shape[0], columns)


def _save_codes(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    codes, _, bits, columns = inputs
    ctx.save_for_backward(codes)
    ctx.bits, ctx.columns = bits, columns


def _scale_gradient(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, None, None]:
    (codes,) = ctx.saved_tensors
    steps = unpack_codes(codes, ctx.bits, ctx.columns).to(gradient.dtype)
    filled = codes.shape[1] * block_size(codes, ctx.bits) - ctx.columns
    moved = torch.nn.functional.pad(gradient * steps, (0, filled))
    return None, moved.reshape(*codes.shape[:2], -1).sum(-1), None, None


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
) -> torch.Tensor:
    """x f[..., K] times the weight of the codes, plus bias f[N] -> f[..., N].

    With `rounded` each block of x is rounded to 8 bits first (`quantize_blocks`).
    """
    given = quantize_blocks(x, block_size(codes, bits)) if rounded else x
    return torch.nn.functional.linear(given, dequantize_blocks(codes, scale, bits, columns), bias)


@linear_blocks.register_fake
def _(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    columns: int,
    rounded: bool,
) -> torch.Tensor:
    _check(codes, scale, bits, columns)
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@torch.library.custom_op("bmgraph::embedding_blocks", mutates_args=())
def embedding_blocks(
    codes: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor, bits: int, block: int
) -> torch.Tensor:
    """The rows ids i64[...] of a table f[N, K] in codes u8[N, K * bits / 8], scales f[N, B] -> f[..., K]."""
    flat = ids.reshape(-1)
    values = _unsigned(codes[flat], bits).flatten(1).to(scale.dtype).sub_(zero_code(bits))
    values.mul_(scale[flat].repeat_interleave(block, 1)[:, : values.shape[1]])
    return values.reshape(*ids.shape, -1)


@embedding_blocks.register_fake
def _(codes: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    return scale.new_empty(*ids.shape, codes.shape[1] * 8 // bits)


TRAITS: dict[Any, Traits] = {
    torch.ops.bmgraph.dequantize_blocks: Traits(),
}
"""The rows of these operators. How the dimensions of codes belong to those of the weight is not said, since a byte holds
several: what drops channels declines such weights."""
