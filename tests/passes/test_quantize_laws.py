"""Laws of codes in blocks: half a step, idempotence, packing; and the arithmetic of ONNX Runtime's kernel and quantizer on them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmgraph.ops.block_codes import BITS, pack_codes, pack_zeros, unpack_codes, unpack_zeros, zero_bytes
from bmgraph.passes.quantize.block_codes import BlockCodes

forms = st.builds(
    BlockCodes, st.sampled_from(BITS), st.sampled_from([16, 32, 64, 128, 256]), st.booleans(), st.booleans()
)


def drawn(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) ** 3
    return torch.where(torch.rand(rows, columns, generator=generator) < 0.1, 0.0, values)


@settings(max_examples=40, deadline=None)
@given(forms, st.integers(1, 4), st.integers(1, 300), st.integers(0, 2**31))
def test_codes_stand_within_half_a_step_and_encode_to_themselves(
    form: BlockCodes, rows: int, columns: int, seed: int
) -> None:
    weight = drawn(rows, columns, seed)
    stored = form.encode(weight, 0)
    value = form.decode(stored, weight.shape, 0)
    steps = stored.scale.abs().repeat_interleave(form.block, 1)[:, :columns]
    beyond = (
        1.0 if form.symmetric and not form.positive else 0.5
    )  # a value may lie one step above the largest code
    half = torch.where((weight / steps).abs() > form.most, beyond, 0.5)
    assert bool(((value - weight).abs() <= steps * (half + 1e-4)).all())
    assert bool((value[weight == 0] == 0).all())
    again = form.encode(value, 0)
    torch.testing.assert_close(again.scale, stored.scale, rtol=1e-5, atol=0)
    assert torch.equal(again.codes, stored.codes)
    assert (again.zero is None) == form.symmetric
    assert torch.equal(form.decode(again, weight.shape, 0) == 0, value == 0)
    assert form.symmetric or torch.equal(again.zero, stored.zero)  # type: ignore[arg-type]
    turned = form.encode(weight.T.contiguous(), 1)
    assert all(one is other or torch.equal(one, other) for one, other in zip(turned, stored))  # type: ignore[arg-type]
    whole = torch.Size((rows, -(-columns // form.block) * form.block))
    filled = form.decode(stored, whole, 0)[:, columns:]
    assert bool((filled == 0).all())  # what fills the last block stands for zeros


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(BITS),
    st.sampled_from([16, 32, 256]),
    st.integers(1, 3),
    st.integers(1, 300),
    st.integers(0, 2**31),
)
def test_packing_is_a_string_of_bits(bits: int, block: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    least = -(2 ** (bits - 1))
    codes = torch.randint(least, -least, (rows, columns), generator=generator).to(torch.int8)
    packed = pack_codes(codes, bits, block)
    assert list(packed.shape) == [rows, -(-columns // block), block * bits // 8]
    assert torch.equal(unpack_codes(packed, bits, columns), codes)
    number = int.from_bytes(bytes(packed[0, 0].tolist()), "little")
    held = [(number >> (bits * place)) % 2**bits + least for place in range(min(block, columns))]
    assert held == codes[0, :block].tolist()


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 3), st.integers(1, 40), st.integers(0, 2**31))
def test_zero_points_are_a_string_of_bits(bits: int, rows: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    least = -(2 ** (bits - 1))
    zero = torch.randint(least, -least, (rows, count), generator=generator).to(torch.int8)
    packed = pack_zeros(zero, bits)
    assert list(packed.shape) == [rows, zero_bytes(count, bits)] == [rows, -(-count * bits // 8)]
    assert torch.equal(unpack_zeros(packed, bits, count), zero)
    number = int.from_bytes(bytes(packed[0].tolist()), "little")
    assert [(number >> (bits * place)) % 2**bits + least for place in range(count)] == zero[0].tolist()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "block"), [(2, 32), (4, 16), (4, 128), (8, 32)])
def test_the_kernels_of_onnx_runtime_read_the_same_weight(bits: int, block: int, symmetric: bool) -> None:
    """Of a product, and of a lookup, whose rows are whole bytes of codes; 80 columns are no whole number of blocks of 32 or 128."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    rows, columns = 24, 80
    form, weight = BlockCodes(bits, block, symmetric=symmetric), drawn(rows, columns, 5)
    stored = form.encode(weight, 0)
    lookup = bits != 2  # the operator has 4 and 8 bits
    helper, number = onnx.helper, onnx.numpy_helper.from_array
    zero = [] if stored.zero is None else ["zero"]
    nodes = [
        helper.make_node(
            "MatMulNBits", ["x", "codes", "scale", *zero], ["y"], domain="com.microsoft", K=columns, N=rows, bits=bits,
            block_size=block, accuracy_level=1,
        ),
        helper.make_node(
            "GatherBlockQuantized", ["flat", "ids", "scale", *zero], ["rows"], domain="com.microsoft", bits=bits, block_size=block,
            gather_axis=0, quantize_axis=1,
        ),
    ]  # fmt: skip
    kind, whole = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    held = {
        "codes": stored.codes, "scale": stored.scale, "zero": stored.zero,
        "flat": stored.codes.flatten(1)[:, : columns * bits // 8].contiguous(),
    }  # fmt: skip
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes if lookup else nodes[:1], "one", [value("x", kind, [None, columns]), value("ids", whole, [None])],
        [value("y", kind, [None, rows]), *([value("rows", kind, [None, columns])] if lookup else [])],
        [number(item.numpy(), name) for name, item in held.items() if item is not None],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    given = {"x": torch.eye(columns).numpy(), "ids": torch.arange(rows).numpy()}
    found = [torch.from_numpy(item) for item in session.run(None, given)]
    expected = form.decode(stored, weight.shape, 0)
    torch.testing.assert_close(found[0].T, expected, rtol=1e-6, atol=0)
    if lookup:
        torch.testing.assert_close(found[1], expected, rtol=1e-6, atol=0)


def test_codes_are_those_of_onnx_runtime_quantizer() -> None:
    pybind = pytest.importorskip("onnxruntime.capi._pybind_state")
    rows, columns, block = 24, 96, 32
    weight = drawn(rows, columns, 6)
    codes, scale, _ = BlockCodes(4, block).encode(weight, 0)
    packed = torch.zeros(rows, columns // block, block // 2, dtype=torch.uint8).numpy()
    scales, zeros = (
        torch.zeros(rows * columns // block).numpy(),
        torch.zeros(rows * 2, dtype=torch.uint8).numpy(),
    )
    pybind.quantize_matmul_4bits(
        packed, weight.T.contiguous().numpy(), scales, zeros, block, rows, columns, True
    )
    theirs = torch.from_numpy(scales).reshape(rows, -1)
    torch.testing.assert_close(theirs, scale, rtol=1e-6, atol=0)
    differ = unpack_codes(torch.from_numpy(packed), 4, columns).int() - unpack_codes(codes, 4, columns).int()
    assert int(differ.abs().max()) <= 1  # they round halves up
    assert float((differ != 0).double().mean()) < 0.01
