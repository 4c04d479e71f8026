"""ONNX engines of every zoo architecture: outputs equal eager at two sizes."""

from __future__ import annotations

import pytest
import torch

import bmgraph as bg
from tests.helpers.captured import NAMES, TOLERANCE, batches, captured, distance, eager_outputs
from tests.helpers.sweep import sweep
from tests.helpers.zoo import BY_NAME

pytest.importorskip("onnxruntime")

QUICK = ("bert", "llama", "mamba", "mixtral", "t5", "vit", "wav2vec2")
"""One architecture of each kind; the others are slow tests."""


@pytest.mark.parametrize("name", sweep(NAMES, QUICK))
def test_engine_equals_eager_at_two_sizes(name: str) -> None:
    model, program = captured(name)
    engine = bg.compile(program, passes=[], example=program.example, backend="onnx")
    model.eval()
    for batch in batches(BY_NAME[name]):
        with torch.no_grad():
            expected = eager_outputs(model, batch, [spec.name for spec in program.outputs])
        found = engine(**batch)
        assert set(found) == set(expected)
        for key, value in found.items():
            assert value.shape == expected[key].shape
            assert distance(torch.as_tensor(value), expected[key]) < TOLERANCE, key
