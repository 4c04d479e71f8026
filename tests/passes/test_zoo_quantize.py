"""Quantize on every zoo architecture: verification accepts it at default settings, and roles are unchanged."""

from __future__ import annotations

import pytest

import bmgraph as bg
from bmgraph.passes import Quantize
from tests.helpers.captured import NAMES, batches, captured
from tests.helpers.zoo import BY_NAME

QUICK = ("gpt2", "t5", "vit")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_quantize_is_not_stopped(name: str) -> None:
    _, program = captured(name)
    roles = program.structure().roles
    for mode in ("static", "dynamic", "none"):
        small = bg.Pipeline([Quantize("int8", activations=mode)]).run(
            program, calibration=batches(BY_NAME[name])
        )
        assert small.history[-1].edits
        assert small.structure().roles == roles
