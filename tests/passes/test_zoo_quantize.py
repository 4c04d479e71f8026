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


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_int4_is_not_stopped(name: str) -> None:
    """At most a drift of 1: random toys lose more to 4 bits than trained models do."""
    _, program = captured(name)
    roles = program.structure().roles
    for method in ("rtn", "gptq"):
        item = Quantize("int4", method=method, group=16, embeddings=8)
        small = bg.Pipeline([item]).run(program, calibration=batches(BY_NAME[name]), max_drift=1.0)
        assert any("int4 weight" in edit.what for edit in small.history[-1].edits)
        assert small.structure().roles == roles
