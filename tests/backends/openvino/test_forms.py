"""The forms that OpenVINO runs fastest compute what the plain ones do: zero points in biases, attention by products."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import OpenVINO
from bmgraph.backends.onnx.export import translate
from bmgraph.backends.onnx.pack_attention import pack_attention
from bmgraph.backends.openvino.attention_forms import repeat_heads
from bmgraph.backends.openvino.fold_zero_points import fold_zero_points
from bmgraph.backends.openvino.lower import lower
from bmgraph.backends.openvino.matmul_attention import attention_translations
from bmgraph.backends.openvino.round_in_kernel import round_in_kernel
from bmgraph.errors import BackendError, PassError
from bmgraph.ir.program import Program
from bmgraph.lowering.to_exported_program import deployed
from bmgraph.passes import Quantize
from bmgraph.verify.metrics import relative_error

onnxruntime = pytest.importorskip("onnxruntime")


def run(model: ir.Model, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The first output of an ONNX model on ONNX Runtime, without its own rewrites."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return torch.as_tensor(session.run(None, {name: value.numpy() for name, value in given.items()})[0])


def quantized(model: nn.Module, x: torch.Tensor) -> Program:
    item = Quantize("int8", activations="static", outliers=False)
    return bg.Pipeline([item]).run(bg.capture(model, {"input": x}), calibration=[{"input": x}])


class Three(nn.Module):
    """Products with and without bias; the rounded input is read by two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 24), nn.Linear(16, 24, bias=False), nn.Linear(24, 16)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.c(self.a(input) * self.b(input).sigmoid())


@pytest.mark.parametrize("shape", [pytest.param((5, 16), marks=pytest.mark.slow), (2, 5, 16)])
def test_zero_points_move_into_biases(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.7
    model = translate(deployed(quantized(Three(), x)))
    expected = run(model, {"input": x})
    assert fold_zero_points(model) == 2
    rounded = [node for node in model.graph if node.op_type == "DequantizeLinear" and not _is_constant(node)]
    assert [len(node.inputs) for node in rounded] == [2, 2]
    assert relative_error(run(model, {"input": x}), expected) < 1e-5


def _is_constant(node: ir.Node) -> bool:
    value = node.inputs[0]
    return value is not None and value.const_value is not None


def test_a_zero_point_that_another_call_reads_stays() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 16)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self.a(input)

    x = torch.randn(4, 16) + 0.5
    program = quantized(Both(), x)
    rounding = next(node for node in program.graph.nodes if "quantize_static" in str(node.target))
    with program.edit() as editor:
        (linear,) = rounding.users
        added = editor.call(torch.ops.aten.add.Tensor, linear, rounding, like=linear, after=linear)
        editor.replace(linear, added)
    model = translate(deployed(program))
    assert fold_zero_points(model) == 0


class Attend(nn.Module):
    """Attention of four heads; keys where the mask is 0 are hidden by `hide`, or by booleans where it is None."""

    def __init__(self, hide: float | None, causal: bool) -> None:
        super().__init__()
        self.hide, self.causal = hide, causal
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows, length, _ = x.shape
        q, k, v = (part(x).reshape(rows, length, 4, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        hidden: Any = mask[:, None, None, :] != 0
        if self.hide is not None:
            hidden = torch.zeros(hidden.shape).masked_fill(~hidden, self.hide)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=hidden)
        return out.transpose(1, 2).reshape(rows, length, 16)


@pytest.mark.parametrize(
    "hide",
    [
        None,
        torch.finfo(torch.float32).min,
        *(pytest.param(hide, marks=pytest.mark.slow) for hide in (-math.inf, -1e4)),
    ],
)
def test_attention_by_products_equals_torchs(hide: float | None) -> None:
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    module = Attend(hide, False)
    given = {"x": x, "mask": torch.ones_like(mask)}
    served = deployed(bg.capture(module, given))
    assert pack_attention(served) == 1
    model = translate(served, attention_translations())
    kinds = {node.op_type for node in model.graph}
    assert {"MatMul", "Softmax"} <= kinds
    assert not kinds & {"Attention", "MultiHeadAttention"}
    found, expected = run(model, {"x": x, "mask": mask}), module(x, mask)
    assert torch.allclose(found, expected, atol=2e-6)


class Shared(nn.Module):
    """Attention whose four query heads share two heads of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = (part(x).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.q, self.k))
        return nn.functional.scaled_dot_product_attention(q, k, k + 1.0, is_causal=True, enable_gqa=True)


def test_neighbouring_query_heads_share_a_key_head() -> None:
    module, x = Shared(), torch.randn(2, 6, 8)
    served = deployed(bg.capture(module, {"x": torch.randn(3, 5, 8)}, prove=False))
    assert repeat_heads(served) == 1
    assert torch.allclose(run(translate(served), {"x": x}), module(x), atol=2e-6)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            Quantize("int4", group=64),
            "0.weight: quantize{scheme=int4,group=64} gave it groups of 64 of its 48 inputs",
        ),
        (Quantize("int3", group=16), "gave it codes of 3 bits, and OpenVINO reads 4 or 8"),
    ],
)
def test_codes_that_openvino_does_not_read_are_told_with_their_site(item: Quantize, message: str) -> None:
    program = bg.capture(nn.Sequential(nn.Linear(48, 32)), {"input": torch.randn(3, 48)}, prove=False)
    small = bg.Pipeline([item]).run(program, max_drift=2.0)
    with pytest.raises(BackendError, match=message):
        lower(deployed(small))
    with pytest.raises(PassError, match="openvino has no kernel for codes of 3 bits"):
        bg.Pipeline([Quantize("int3")]).run(program, target=OpenVINO.target)


def test_rounding_is_left_to_the_kernels_where_all_products_have_it() -> None:
    two = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))
    program = bg.capture(two, {"input": torch.randn(3, 32)}, prove=False)
    small = bg.Pipeline([Quantize("int4", group=16)]).run(program, max_drift=2.0, target=OpenVINO.target)

    def roundings(served: Program) -> list[Any]:
        return [
            node for node in served.graph.nodes if node.target is torch.ops.bmgraph.quantize_blocks.default
        ]

    served = deployed(small)
    assert len(roundings(served)) == 2
    assert round_in_kernel(served) == 16
    assert not roundings(served)
    mixed = deployed(small)
    first = roundings(mixed)[0]
    first.replace_all_uses_with(first.args[0])
    assert round_in_kernel(mixed) == 0
    assert len([node for node in roundings(mixed) if node.users]) == 1
