"""Layers, channels, queries and features of heads on every zoo architecture, against the eager model made smaller by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import PassError
from bmgraph.ir.program import Program
from bmgraph.passes import Shrink
from tests.helpers.captured import NAMES, TOLERANCE, batches, captured, distance, eager_outputs
from tests.helpers.shrunk import by_hand
from tests.helpers.zoo import BY_NAME

pytestmark = pytest.mark.slow


def check(name: str, item: Shrink, tolerance: float = TOLERANCE) -> Program:
    model, program = captured(name)
    small = bg.Pipeline([item]).run(program, max_drift=4.0)
    expected = by_hand(model, small)
    for batch in batches(BY_NAME[name]):
        found = small(**batch)
        with torch.no_grad():
            wanted = eager_outputs(expected, batch, list(found))
        for key, value in found.items():
            assert distance(value, wanted[key]) < tolerance, key
    assert small.structure().roles == program.structure().roles
    return small


NO_ATTENTION = ("mamba", "mamba2")

DECLINED = ("wav2vec2", "hubert")
"""Architectures that read channels in a convolution with groups."""


@pytest.mark.parametrize("name", NAMES)
def test_channels(name: str) -> None:
    if name in DECLINED:
        with pytest.raises(
            PassError, match=r"operator conv1d in encoder\.pos_conv_embed\.conv needs all of them"
        ):
            check(name, Shrink(hidden=0.25))
        return
    small = check(name, Shrink(hidden=0.25))
    assert not small.history[-1].declined


@pytest.mark.parametrize("name", [item for item in NAMES if item not in NO_ATTENTION])
def test_features_of_heads(name: str) -> None:
    check(name, Shrink(head_size=0.5))


@pytest.mark.parametrize("name", [item for item in NAMES if item != "albert"])
def test_layers(name: str) -> None:
    model, program = captured(name)
    numbers = [1, 3] if name.startswith("t5") else range(len(program.structure().layers))
    for number in numbers:  # the first layer of a T5 holds the bias of positions of all
        small = bg.Pipeline([Shrink(layers=(number,))]).run(program, max_drift=4.0)
        expected = copy.deepcopy(model)
        parts = small.history[-1].edits[0].site.split(".")
        paths = [".".join(parts[:count]) for count in range(1, len(parts))]
        path = next(item for item in paths if isinstance(expected.get_submodule(item), nn.ModuleList))
        place = int(parts[path.count(".") + 1])
        del expected.get_submodule(path)[place]  # type: ignore[attr-defined]
        if hasattr(expected.config, "layer_types"):
            del expected.config.layer_types[place]
            expected.config.use_cache = False
        for batch in batches(BY_NAME[name]):
            found = small(**batch)
            with torch.no_grad():
                wanted = eager_outputs(expected, batch, list(found))
            for key, value in found.items():
                assert distance(value, wanted[key]) < TOLERANCE, key


def test_a_layer_that_runs_several_times_stays() -> None:
    with pytest.raises(PassError, match="its weights are used several times, so that it runs several times"):
        bg.Pipeline([Shrink(layers=(0,))]).run(captured("albert")[1])


@pytest.mark.parametrize("name", [item for item in NAMES if 1 < BY_NAME[item].expected.kv_heads < 4])
def test_queries_within_groups(name: str) -> None:
    check(name, Shrink(queries=0.5))


def test_nothing_to_shrink() -> None:
    for name in NO_ATTENTION:
        with pytest.raises(PassError, match=r"changed nothing"):
            bg.Pipeline([Shrink(head_size=0.5)]).run(captured(name)[1])
