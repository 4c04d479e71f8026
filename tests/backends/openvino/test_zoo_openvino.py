"""OpenVINO engines of every zoo architecture: outputs equal eager at two sizes, and int8 engines their programs."""

from __future__ import annotations

import pytest
import torch

import bmgraph as bg
from bmgraph.passes import Quantize
from tests.helpers.captured import NAMES, TOLERANCE, batches, captured, distance, eager_outputs
from tests.helpers.openvino import needs_openvino
from tests.helpers.sweep import sweep
from tests.helpers.zoo import BY_NAME

needs_openvino()

QUICK = ("bert",)


@pytest.mark.parametrize("name", sweep(NAMES, QUICK))
def test_engine_equals_eager_at_two_sizes(name: str) -> None:
    model, program = captured(name)
    engine = bg.compile(program, passes=[], example=program.example, backend="openvino")
    model.eval()
    for batch in batches(BY_NAME[name]):
        with torch.no_grad():
            expected = eager_outputs(model, batch, [spec.name for spec in program.outputs])
        found = engine(**batch)
        assert set(found) == set(expected)
        for key, value in found.items():
            assert value.shape == expected[key].shape
            assert distance(torch.as_tensor(value), expected[key]) < TOLERANCE, key


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_int8_engine_is_compared_with_its_program(name: str) -> None:
    _, program = captured(name)
    calibration = batches(BY_NAME[name])
    engine = bg.compile(
        program, passes=[Quantize("int8")], backend="openvino", calibration=calibration, max_drift=2.0
    )
    assert engine.report.engine_drift is not None
