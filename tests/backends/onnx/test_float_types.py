"""Half precision keeps its type in an engine; float64 is refused where ONNX Runtime has no kernel for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bmgraph as bg
from bmgraph.errors import BackendError
from bmgraph.passes import Quantize
from bmgraph.verify.metrics import relative_error


class Layer(nn.Module):
    """Attention over padding and a feed-forward."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16, dtype=dtype) for _ in range(4))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (item(x).view(*mask.shape, 2, -1).transpose(1, 2) for item in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, (mask != 0)[:, None, None])
        return self.o(attended.transpose(1, 2).reshape(x.shape)).relu()  # type: ignore[no-any-return]


def _batch(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    return {"x": x.to(dtype), "mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}


@pytest.mark.parametrize("activations", ["none", "dynamic", "static"])
def test_float16(activations: str) -> None:
    model, batch = Layer(torch.float16).eval(), _batch(torch.float16)
    passes = [Quantize("int8", activations=activations, smallest=1)]
    engine = bg.compile(model, passes=passes, example=batch, backend="onnx", calibration=[batch])
    found = engine(**batch)["output"]
    assert found.dtype == torch.float16
    assert relative_error(found, model(**batch)) < 2e-2


def test_float64_is_refused_where_it_has_no_kernel() -> None:
    with pytest.raises(
        BackendError, match="attention of the model's root, made by capture, computes in float64"
    ):
        bg.compile(Layer(torch.float64), passes=[], example=_batch(torch.float64), backend="onnx")
    linear = bg.capture(nn.Linear(16, 16, dtype=torch.float64), {"input": torch.randn(3, 16).double()})
    assert bg.compile(linear, passes=[], backend="onnx").outputs[0].dtype == torch.float64
    with pytest.raises(BackendError, match=r"of weight, made by quantize.*computes in float64"):
        bg.compile(linear, passes=[Quantize("int8", activations="none", smallest=1)], backend="onnx")
