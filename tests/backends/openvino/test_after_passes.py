"""OpenVINO engines of programs that passes changed: each is compared with its program as it is compiled."""

from __future__ import annotations

import pytest

import bmgraph as bg
from bmgraph.backends import OpenVINO
from bmgraph.pass_manager.pass_base import ModelPass
from bmgraph.passes import IA3, Adapter, DoRA, LoRA, MoEfy, Prefix, Prune, Quantize, Shrink, SoftPrompt
from tests.helpers.captured import captured
from tests.helpers.deltas import trained
from tests.helpers.openvino import needs_openvino
from tests.helpers.zoo import BY_NAME

needs_openvino()

WEIGHTS = Quantize("int8", activations="none")

PASSES: dict[str, tuple[ModelPass, ...]] = {
    "a low-rank delta on int8 weights": (WEIGHTS, LoRA(r=4)),
    "int8 behind a delta": (LoRA(r=4), Quantize("int8", activations="static")),
    "dora": (DoRA(r=4),),
    "ia3": (IA3(),),
    "adapter": (Adapter(4),),
    "soft prompt": (SoftPrompt(3),),
    "prefix": (Prefix(3),),
    "2:4": (Prune(),),
    "shrunk, then int8": (
        Shrink(ffn=0.25, heads=0.25, scope="global"),
        Quantize("int8", activations="static"),
    ),
    "experts of int8 weights": (WEIGHTS, MoEfy(experts=8, active=4)),
    "int8 experts": (MoEfy(experts=8, active=4), Quantize("int8", activations="static")),
}


DELTAS = (LoRA, DoRA, IA3, Adapter, SoftPrompt, Prefix)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
@pytest.mark.parametrize("what", PASSES)
def test_an_engine_equals_its_program(what: str, name: str) -> None:
    passes = PASSES[what]
    made = bg.Pipeline(passes).run(
        captured(name)[1], calibration=[BY_NAME[name].example(4, 12)], target=OpenVINO.target, max_drift=2.0
    )
    rounds = any(isinstance(item, Quantize) and item.activations == "static" for item in passes)
    if not rounds and isinstance(passes[-1], DELTAS):
        made = trained(made)  # else they change nothing
    engine = bg.compile(made, backend="openvino")
    assert engine.report.engine_drift is not None
    assert rounds or engine.report.engine_drift < 1e-4
