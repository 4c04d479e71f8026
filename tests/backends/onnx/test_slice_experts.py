"""Each expert's weights are constants of their own in the file, whatever their size: kernels of codes take nothing else."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

import bmgraph as bg
from bmgraph.backends.onnx.export import FOLDED_BYTES
from bmgraph.passes import Quantize
from bmgraph.runtime.ort.bundle import MODEL_FILE
from tests.backends.onnx.test_pack_experts import WIDTH

pytest.importorskip("onnxruntime")

EXPERTS, NEURONS = 3, 512


class Stack(torch.nn.Module):
    """Products with the expert that the input names, and with the first expert."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(EXPERTS, NEURONS, WIDTH))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.ops.bmgraph.experts_linear(x, self.weight, ids)  # type: ignore[no-any-return]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_large_codes_are_saved_and_loaded(tmp_path: Path, scheme: str) -> None:
    example = {"x": torch.randn(4, WIDTH), "ids": torch.tensor([[0], [2], [1], [2]])}
    item = Quantize(scheme, activations="none", site_drift=1.0)
    engine = bg.compile(Stack(), [item], example=example, backend="onnx", max_drift=1.0)
    model = onnx.load(str(engine.folder / MODEL_FILE))
    codes = [item for item in model.graph.initializer if item.data_type == onnx.TensorProto.UINT8]
    assert len(codes) == EXPERTS
    assert min(len(item.raw_data) for item in codes) * (2 if scheme == "int4" else 1) > FOLDED_BYTES
    engine.save(tmp_path / "engine")
    assert torch.equal(bg.load(tmp_path / "engine")(**example)["output"], engine(**example)["output"])
