"""Laws of codes in blocks: half a step, idempotence, packing; and the arithmetic of ONNX Runtime's kernel and quantizer on them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmgraph.ops.block_codes import BITS, pack_codes, unpack_codes
from bmgraph.passes.quantize.block_codes import BlockCodes

forms = st.builds(BlockCodes, st.sampled_from(BITS), st.sampled_from([16, 32, 64, 128, 256]), st.booleans())


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
    codes, scale = form.encode(weight, 0)
    value = form.decode(codes, scale, weight.shape, 0)
    steps = scale.abs().repeat_interleave(form.block, 1)[:, :columns]
    beyond = 0.0 if form.positive else 1.0  # a value may lie one step above the largest code
    half = torch.where((weight / steps).abs() > form.most, beyond, 0.5) if beyond else 0.5
    assert bool(((value - weight).abs() <= steps * (torch.as_tensor(half).clamp(min=0.5) + 1e-4)).all())
    again, same = form.encode(value, 0)
    torch.testing.assert_close(same, scale, rtol=1e-6, atol=0)
    assert torch.equal(again, codes)
    assert torch.equal(form.decode(again, same, weight.shape, 0) == 0, value == 0)
    turned = form.encode(weight.T.contiguous(), 1)
    assert all(torch.equal(one, other) for one, other in zip(turned, (codes, scale)))


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


@pytest.mark.parametrize(("bits", "block"), [(2, 32), (4, 16), (4, 128), (8, 32)])
def test_the_kernel_of_onnx_runtime_reads_the_same_weight(bits: int, block: int) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    rows, columns = 24, 80
    form, weight = BlockCodes(bits, block), drawn(rows, columns, 5)
    codes, scale = form.encode(weight, 0)
    helper, number = onnx.helper, onnx.numpy_helper.from_array
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scale"], ["y"], domain="com.microsoft", K=columns, N=rows, bits=bits,
        block_size=block, accuracy_level=1,
    )  # fmt: skip
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node], "one", [helper.make_tensor_value_info("x", kind, [None, columns])],
        [helper.make_tensor_value_info("y", kind, [None, rows])],
        [number(codes.numpy(), "codes"), number(scale.numpy(), "scale")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"x": torch.eye(columns).numpy()})[0]).T
    torch.testing.assert_close(found, form.decode(codes, scale, weight.shape, 0), rtol=1e-6, atol=0)


def test_codes_are_those_of_onnx_runtime_quantizer() -> None:
    pybind = pytest.importorskip("onnxruntime.capi._pybind_state")
    rows, columns, block = 24, 96, 32
    weight = drawn(rows, columns, 6)
    codes, scale = BlockCodes(4, block).encode(weight, 0)
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
