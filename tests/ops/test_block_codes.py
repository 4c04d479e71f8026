"""Codes of blocks, several in a byte: their bits, their values, their gradients, and arguments that do not fit."""

from __future__ import annotations

import pytest
import torch

from bmgraph.ops.block_codes import (
    dequantize_blocks,
    embedding_blocks,
    linear_blocks,
    pack_codes,
    pack_zeros,
    unpack_codes,
)
from bmgraph.ops.quantization import quantize_blocks


def naive(codes: torch.Tensor, scale: torch.Tensor, block: int) -> torch.Tensor:
    """Codes i8[N, K] times the scale of their block."""
    found = torch.zeros(codes.shape)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            found[row, column] = float(codes[row, column]) * scale[row, column // block]
    return found


@pytest.mark.parametrize(("bits", "columns"), [(2, 48), (4, 48), (4, 37), (8, 37)])
def test_codes_are_packed_low_bits_first(bits: int, columns: int) -> None:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, columns), dtype=torch.int8)
    packed, scale = pack_codes(codes, bits, 16), torch.randn(3, 3)
    assert packed.shape == (3, 3, 16 * bits // 8)
    assert torch.equal(unpack_codes(packed, bits, columns), codes)
    whole = sum((int(codes[1, place]) + 2 ** (bits - 1)) << (bits * place) for place in range(8 // bits))
    assert int(packed[1, 0, 0]) == whole
    assert torch.equal(dequantize_blocks(packed, scale, bits, columns), naive(codes, scale, 16))
    two = torch.cat([packed, packed]), torch.cat([scale, scale])  # products of one input are one
    assert torch.equal(dequantize_blocks(*two, bits, columns)[3:], naive(codes, scale, 16))


def test_what_kernels_compute_is_made_of_the_weight() -> None:
    codes = torch.randint(-8, 8, (6, 40), dtype=torch.int8)
    packed, scale, x, bias = (
        pack_codes(codes, 4, 16),
        torch.randn(6, 3),
        torch.randn(2, 5, 40),
        torch.randn(6),
    )
    weight = naive(codes, scale, 16)
    torch.testing.assert_close(
        linear_blocks(x, packed, scale, bias, 4, 40, False), torch.nn.functional.linear(x, weight, bias)
    )
    rounded = quantize_blocks(x, 16)
    step = x[..., 32:].abs().amax(-1, keepdim=True) / 127  # the last block is smaller
    torch.testing.assert_close(rounded[..., 32:], torch.round(x[..., 32:] / step) * step)
    torch.testing.assert_close(
        linear_blocks(x, packed, scale, None, 4, 40, True), torch.nn.functional.linear(rounded, weight)
    )
    ids, rows = torch.tensor([[5, 0], [2, 2]]), packed.flatten(1)[:, :20].contiguous()
    assert torch.equal(embedding_blocks(rows, ids, scale, 4, 16), weight[ids])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_are_taken_off_codes(bits: int) -> None:
    least = -(2 ** (bits - 1))
    codes, zero = (torch.randint(least, -least, (6, columns), dtype=torch.int8) for columns in (40, 3))
    packed, stored, scale = pack_codes(codes, bits, 16, zero), pack_zeros(zero, bits), torch.randn(6, 3)
    weight = naive(codes.int() - zero.repeat_interleave(16, 1)[:, :40].int(), scale, 16)
    assert torch.equal(dequantize_blocks(packed, scale, bits, 40, stored), weight)
    assert bool((dequantize_blocks(packed, scale, bits, 48, stored)[:, 40:] == 0).all())
    x, bias, ids = torch.randn(2, 5, 40), torch.randn(6), torch.tensor([[5, 0], [2, 2]])
    found = linear_blocks(x, packed, scale, bias, bits, 40, False, stored)
    torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, bias))
    rows = packed.flatten(1)[:, : 40 * bits // 8].contiguous()
    assert bits == 3 or torch.equal(embedding_blocks(rows, ids, scale, bits, 16, stored), weight[ids])


def test_a_scale_has_a_gradient() -> None:
    codes = torch.randint(-8, 8, (2, 20), dtype=torch.int8)
    scale = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    packed = pack_codes(codes, 4, 16)
    assert torch.autograd.gradcheck(lambda item: dequantize_blocks(packed, item, 4, 20), (scale,))
    zero = pack_zeros(torch.tensor([[-8, 7], [3, -1]], dtype=torch.int8), 4)
    assert torch.autograd.gradcheck(lambda item: dequantize_blocks(packed, item, 4, 20, zero), (scale,))


def test_arguments_that_do_not_fit_are_refused() -> None:
    packed, scale = torch.zeros(2, 2, 8, dtype=torch.uint8), torch.ones(2, 2)
    for wrong in (
        (packed, scale, 3, 20),
        (packed, scale, 4, 33),
        (packed, scale[:1], 4, 20),
        (packed.int(), scale, 4, 20),
        (packed, scale, 4, 20, torch.zeros(2, 2, dtype=torch.uint8)),
        (packed, scale, 4, 20, torch.zeros(2, 1)),
    ):
        with pytest.raises(RuntimeError, match=r"expected|more than"):
            dequantize_blocks(*wrong)
        with pytest.raises(RuntimeError, match=r"expected|more than"):
            dequantize_blocks(
                *(item.to("meta") if isinstance(item, torch.Tensor) else item for item in wrong)
            )
