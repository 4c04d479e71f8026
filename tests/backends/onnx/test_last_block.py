"""Inputs that are rounded by blocks, whose last block is not whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.passes import Quantize
from bmgraph.verify.metrics import relative_error


@pytest.mark.parametrize("width", [20, 40])
def test_inputs_are_rounded_in_front_of_two_bit_codes(width: int) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 24):
        pytest.skip("onnxruntime multiplies by 2-bit codes since 1.24")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 32), nn.Tanh(), nn.Linear(32, width))
    example = {"input": torch.randn(3, 5, width)}
    engine = bg.compile(model, [Quantize("int2", group=16)], example=example, backend="onnx", max_drift=2.0)
    assert engine.report.engine_drift < 1e-6  # to the program, whose inputs are rounded too
    one = engine(input=example["input"][:1, :1])["output"]
    assert relative_error(one, engine(**example)["output"][:1, :1]) < 1e-6
