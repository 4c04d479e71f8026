"""4-bit weights in TensorRT's network: block-wise dequantization of signed codes, and what it does not support."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import TensorRT
from bmgraph.backends.tensorrt.legalize import check_quantization, lower
from bmgraph.errors import BackendError
from bmgraph.ir.program import Program
from bmgraph.lowering.to_exported_program import deployed
from bmgraph.passes import Quantize
from tests.helpers.tensorrt import distance, parsed

if not (find_spec("tensorrt") or find_spec("tensorrt_rtx")):
    pytest.skip("neither tensorrt nor tensorrt-rtx is installed", allow_module_level=True)


@pytest.fixture(scope="module")
def plain() -> Program:
    torch.manual_seed(0)
    return bg.capture(
        nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)), {"input": torch.randn(3, 64)}
    )


def quantized(program: Program, group: int) -> Program:
    return bg.Pipeline([Quantize("int4", group=group)]).run(program, target=TensorRT.target, max_drift=1.0)


def test_codes_are_signed_and_dequantized_by_blocks(plain: Program, tmp_path: Path) -> None:
    small = quantized(plain, 16)
    served = deployed(small)
    check_quantization(served)
    model = lower(served)
    nodes = [node for node in model.graph if "block_size" in node.attributes]
    assert [node.attributes.get_int("block_size", 0) for node in nodes] == [16, 16]
    assert {node.inputs[0].dtype for node in nodes if node.inputs[0] is not None} == {ir.DataType.INT4}
    assert "dequantize" in parsed(model, tmp_path).layers()
    assert distance(model, small, [{"input": torch.randn(5, 64)}], tmp_path) < 1e-5


def test_what_it_does_not_support_is_refused_with_the_site(plain: Program) -> None:
    with pytest.raises(
        BackendError, match=r"2.weight: TensorRT.*codes, which are of 48 inputs in groups of 32"
    ):
        bg.compile(quantized(plain, 32), backend="tensorrt")
    for_torch = bg.Pipeline([Quantize("int4", group=16)]).run(plain, max_drift=1.0)
    with pytest.raises(BackendError, match=r"0.weight: TensorRT.*negative scales: quantise in compile"):
        bg.compile(for_torch, backend="tensorrt")
