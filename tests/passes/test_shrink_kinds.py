"""Shrink beyond neurons and heads: layers, channels of the hidden state, queries within groups, features of heads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import InputError, PassError, ResourceError
from bmgraph.ir.program import Program
from bmgraph.passes import Shrink
from bmgraph.verify.metrics import relative_error
from tests.helpers.grouped_decoder import GroupedDecoder, grouped_decoder
from tests.helpers.models import TinyEncoder, tokens
from tests.helpers.shrunk import by_hand

EXACT = 1e-5


@pytest.fixture(scope="module")
def decoder() -> tuple[GroupedDecoder, Program]:
    model = grouped_decoder(2)
    return model, bg.capture(model, tokens())


def labelled(batch: int = 3, length: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tokens that are their own labels."""
    given = tokens(batch, length, seed)
    return {**given, "labels": given["ids"]}


def distance(program: Program, model: nn.Module) -> float:
    """The largest relative error of the outputs over two sizes."""
    worst = 0.0
    for batch in (labelled(), labelled(5, 11, 1)):
        given = {spec.name: batch[spec.name] for spec in program.inputs}
        with torch.no_grad():
            expected = model(**given)
        worst = max(
            worst, *(relative_error(value, expected[name]) for name, value in program(**given).items())
        )
    return worst


def run(item: Shrink, program: Program, **options: Any) -> Program:
    return bg.Pipeline([item]).run(program, **options)


def kept(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The places of the values that stay of a vector of distinct ones."""
    found = [place for place, value in enumerate(old.tolist()) if value in new.tolist()]
    assert len(found) == len(new)
    return torch.tensor(found)


def without_layers(model: nn.Module, name: str, numbers: tuple[int, ...]) -> nn.Module:
    shorter = copy.deepcopy(model)
    layers = getattr(shorter, name)
    setattr(shorter, name, nn.ModuleList(item for place, item in enumerate(layers) if place not in numbers))
    return shorter


def test_layers_by_number_are_gone(decoder: tuple[GroupedDecoder, Program]) -> None:
    model, program = decoder
    numbers = (0,)
    small = run(Shrink(layers=numbers), program)
    assert distance(small, without_layers(model, "layers", numbers)) < EXACT
    silent = copy.deepcopy(model)
    for number in numbers:
        for linear in (silent.layers[number].o, silent.layers[number].down):
            nn.init.zeros_(linear.weight)
    assert distance(small, silent) < EXACT
    assert {f"layers.{number}" for number in numbers} == {edit.site for edit in small.history[-1].edits}
    gone = tuple(f"layers.{number}." for number in numbers)
    assert not any(name.startswith(gone) for name in small.tensors())
    assert len(small.parameters) == 1 + 1 + (2 - len(numbers)) * 11


def test_the_history_records_the_layers_that_a_share_chose(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [tokens(seed=seed) for seed in range(2)]
    small = bg.Pipeline([Shrink(layers=0.5, ffn=0.25)]).run(program, calibration=given, max_drift=3.0)
    number = small.history[-1].edits[0].what.split()[1]
    assert small.history[-1].text == f"shrink{{ffn=0.25,layers=[{number}]}}"
    assert small.history[-1].resources == {}
    small.save(tmp_path / "small")
    monkeypatch.setattr("bmgraph.passes.shrink.shrink.redundant_layers", None)  # a replay does not measure
    again = bg.replay(tmp_path / "small", program)
    assert all(torch.equal(value, small.parameters[name]) for name, value in again.parameters.items())


def test_layers_of_a_post_norm_encoder(program: Program, model: TinyEncoder) -> None:
    small = run(Shrink(layers=(1,)), program)
    assert distance(small, without_layers(model, "blocks", (1,))) < EXACT


def sliced(model: nn.Module, program: Program, left: torch.Tensor) -> nn.Module:
    """A copy of a model with the channels `left` alone, along each axis along which the program has fewer."""
    small = copy.deepcopy(model)
    for name, parameter in small.named_parameters():
        for axis, size in enumerate(program.parameters[name].shape):
            if parameter.shape[axis] != size:
                parameter.data = parameter.data.index_select(axis, left)
    return small


def test_channels_are_those_of_a_model_whose_norms_see_them_alone(
    decoder: tuple[GroupedDecoder, Program],
) -> None:
    model, program = decoder
    small = run(Shrink(hidden=0.25), program)
    left = kept(model.norm.weight, small.parameters["norm.weight"])
    assert len(left) == 24
    expected = sliced(model, small, left)
    assert small.parameters["embed.weight"].shape == (50, 24)
    assert distance(small, expected) < EXACT
    assert small.structure().roles == program.structure().roles


def test_an_output_keeps_its_width(program: Program, model: TinyEncoder) -> None:
    """Post-norm, with the hidden state as an output: what is gone is zero there, and goes on being so."""
    small = run(Shrink(hidden=0.25), program)
    assert distance(small, by_hand(model, small)) < EXACT
    batch = tokens(5, 11, 1)
    again = run(Shrink(hidden=0.5), small)
    for item, gone in ((small, 8), (again, 20)):
        hidden = item(**batch)["hidden"]
        assert hidden.shape[-1] == 32
        assert int((hidden == 0).all(0).all(0).sum()) == gone


def test_query_heads_go_and_their_keys_stay(decoder: tuple[GroupedDecoder, Program]) -> None:
    model, program = decoder
    small = run(Shrink(queries=0.5), program)
    assert distance(small, by_hand(model, small)) < EXACT
    assert [(item.heads, item.kv_heads) for item in small.structure().attentions] == [(2, 2)] * 2


def test_features_of_heads_go_in_rotary_pairs(decoder: tuple[GroupedDecoder, Program]) -> None:
    model, program = decoder
    small = run(Shrink(head_size=0.5), program)
    assert distance(small, by_hand(model, small)) < EXACT
    left = kept(model.layers[1].k.bias, small.parameters["layers.1.k.bias"]).tolist()
    assert len(left) == 8
    assert {place % 8 for place in left} == {place % 4 + half for place in left for half in (0, 4)}
    assert small.history[-1].edits[0].what.startswith("4 of 8 features of queries and keys: ")


def test_bad_input_is_refused(decoder: tuple[GroupedDecoder, Program], program: Program) -> None:
    _, grouped = decoder
    with pytest.raises(PassError, match=r"layers=\[2\]: the program's layers are 0 to 1"):
        run(Shrink(layers=(2,)), grouped)
    with pytest.raises(
        PassError, match=r"layers=\[0, 1\]: leaves no layer of the stack that layers\.0 is in"
    ):
        run(Shrink(layers=(0, 1)), grouped)
    with pytest.raises(InputError, match=r"layers=\[1, 1\]: number layers from 0 on, and each once"):
        Shrink(layers=(1, 1))
    with pytest.raises(
        InputError, match=r"layers=2: leaves no layer; .* or the numbers of layers, as in layers=\[2\]"
    ):
        Shrink(layers=2)
    with pytest.raises(InputError, match=r"hidden=1\.0: leaves no channel"):
        Shrink(hidden=1.0)
    with pytest.raises(ResourceError, match="calibration"):
        run(Shrink(layers=0.5), grouped)
    with pytest.raises(PassError, match=r"no keys and values are shared by several of its heads"):
        run(Shrink(queries=0.5), program)
    with pytest.raises(PassError, match=r"changed nothing .*0\.1 of its 8 features of values rounds to zero"):
        run(Shrink(head_size=0.1), program)
    plain = bg.capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), (torch.randn(3, 4),))
    with pytest.raises(PassError, match="the program has no repeated layers"):
        run(Shrink(layers=(0,)), plain)
    with pytest.raises(PassError, match="changed nothing"):
        run(Shrink(hidden=0.5), plain)
