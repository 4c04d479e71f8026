"""Cast: another floating-point type everywhere, and engines of bfloat16 programs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import Onnx
from bmgraph.errors import BackendError, InputError, PassError
from bmgraph.pass_manager.report import Report
from bmgraph.passes import Cast, Quantize
from bmgraph.verify.metrics import relative_error


class Mixed(nn.Module):
    """Attention under a mask of lowest numbers, with a norm that is computed in fp32, as half-precision models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(20, 16), nn.LayerNorm(16)
        self.p, self.o = nn.Linear(16, 16), nn.Linear(16, 20)
        self.register_buffer("shift", torch.randn(16))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """ids, mask i64[B, S], x f[B, S, 16] -> f[B, S, 20]."""
        x = self.embed(ids) + self.shift + x
        wide = x.float()
        x = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        lowest = torch.full((1,), torch.finfo(x.dtype).min, dtype=x.dtype)
        bias = lowest * (1 - mask[:, None, None, :].to(x.dtype))
        h = self.p(x).view(x.shape[0], x.shape[1], 2, 8).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(h, h, h, bias)
        return self.o(self.norm(y.transpose(1, 2).reshape(x.shape)))


def example(dtype: torch.dtype, rows: int = 3) -> dict[str, torch.Tensor]:
    mask = torch.ones(rows, 7, dtype=torch.int64)
    mask[-1, 4:] = 0
    return {"ids": torch.randint(0, 20, (rows, 7)), "mask": mask, "x": torch.randn(rows, 7, 16, dtype=dtype)}


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float64, 1e-5)]
)
def test_a_cast_program_computes_the_same_in_fp32(dtype: torch.dtype, bound: float) -> None:
    model, given = Mixed().to(dtype).eval(), example(dtype)
    program = bg.Pipeline([Cast("fp32")]).run(bg.capture(model, given))
    assert {tensor.dtype for tensor in program.tensors().values()} == {torch.float32}
    assert "bf16" not in str(program)
    assert "f64[" not in str(program)
    found = program(**{**given, "x": given["x"].float()})["output"]
    assert found.dtype == torch.float32
    assert relative_error(found, model(**given)) < bound


def test_bfloat16_becomes_fp16_and_fp32_stays() -> None:
    model, given = Mixed().bfloat16().eval(), example(torch.bfloat16)
    program = bg.Pipeline([Cast("fp16")]).run(bg.capture(model, given))
    assert {tensor.dtype for tensor in program.tensors().values()} == {torch.float16}
    assert "aten.rms_norm(%to, [16], None, 1e-06) : f32[" in str(program)
    found = program(**{**given, "x": given["x"].half()})["output"]
    assert relative_error(found, model(**given)) < 2e-2


def test_an_engine_of_a_bfloat16_program_says_that_it_is_cast() -> None:
    model, given = Mixed().bfloat16().eval(), example(torch.bfloat16)
    engine = bg.compile(model, example=given, backend="onnx")
    assert [record.text for record in engine.report.records] == ["cast"]
    assert engine.report.notes == ["cast runs first: the onnx backend needs it for this program"]
    found = engine(**{**given, "x": given["x"].float()})["output"]
    assert relative_error(found, model(**given)) < 2e-2
    assert 0 < engine.report.total_drift < 2e-2


def test_a_bfloat16_program_is_quantized_after_the_cast() -> None:
    model, given = Mixed().bfloat16().eval(), example(torch.bfloat16)
    engine = bg.compile(model, [Quantize("int8", activations="none")], example=given, backend="onnx")
    assert [record.text for record in engine.report.records] == ["cast", "quantize@4{activations=none}"]


def test_lowering_without_the_cast_names_what_to_do() -> None:
    program = bg.capture(Mixed().bfloat16(), example(torch.bfloat16))
    with pytest.raises(BackendError, match=r"embed\.weight is in bfloat16.*Cast\('fp32'\)"):
        Onnx().build(program, Report())


def test_what_cannot_be_cast_is_told() -> None:
    program = bg.capture(nn.Linear(4, 4), {"input": torch.randn(3, 4)})
    with pytest.raises(PassError, match="changed nothing"):
        bg.Pipeline([Cast("fp32")]).run(program)
    with pytest.raises(InputError, match="to='int8': choose one of 'fp32', 'fp16'"):
        Cast("int8")
