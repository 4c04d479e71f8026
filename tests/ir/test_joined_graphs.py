"""A program of several graphs: joined, passes see one dataflow; split again, each graph has its own signature."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import InputError, VerificationError
from bmgraph.ir.joined_graphs import HANDED, join
from bmgraph.ir.program import Program
from bmgraph.ir.split_graphs import split
from bmgraph.ir.verifier import check_program
from tests.helpers.two_graphs import Translator, batch, captured


@pytest.fixture(scope="module")
def two() -> tuple[Translator, Program]:
    return captured()


def test_a_program_runs_its_graphs(two: tuple[Translator, Program]) -> None:
    model, program = two
    check_program(program)
    given = batch(1)
    wanted = model(**given)["scores"]
    assert torch.allclose(program(**given)["scores"], wanted, atol=1e-6)
    encode = program.at("encode")
    memory = encode(ids=given["ids"], attention_mask=given["attention_mask"])["memory"]
    rest = {name: value for name, value in given.items() if name != "ids"}
    assert torch.allclose(program(memory=memory, **rest)["scores"], wanted, atol=1e-6)
    with pytest.raises(InputError, match="missing input 'ids'"):
        program(**rest)
    with pytest.raises(InputError, match=r"no graph is called 'decode': the program has forward, encode"):
        program.at("decode")
    assert encode.parameters is program.parameters
    assert program.clone().at("encode").graph is not encode.graph


def test_joined_and_split_it_is_what_it_was(two: tuple[Translator, Program]) -> None:
    model, program = two
    joined, parts = join(program)
    check_program(joined)
    assert [spec.name for spec in joined.inputs] == ["attention_mask", "decoder_ids", "ids"]
    assert [spec.name for spec in joined.outputs] == ["scores", "memory"]
    assert torch.allclose(joined(**batch(1))["scores"], model(**batch(1))["scores"], atol=1e-6)
    shared = [node for node in joined.graph.nodes if node.target == "embed.weight"]
    assert len(shared) == 1
    assert len(shared[0].users) == 2
    again = split(joined, parts)
    check_program(again)
    for name, signature in program.signatures.items():
        found = again.signatures[name]
        assert replace(found, symbols={}, example={}) == replace(signature, symbols={}, example={})
        assert all(torch.equal(found.example[key], value) for key, value in signature.example.items())
    assert torch.equal(again(**batch(1))["scores"], program(**batch(1))["scores"])


def test_it_comes_back_from_a_file(two: tuple[Translator, Program], tmp_path: Path) -> None:
    _, program = two
    program.save(str(tmp_path / "two"))
    loaded = bg.load(tmp_path / "two")
    assert str(loaded) == str(program)
    assert set(loaded.signatures) == {"forward", "encode"}
    for name, signature in program.signatures.items():
        assert replace(loaded.signatures[name], symbols={}, example={}) == replace(
            signature, symbols={}, example={}
        )
    assert torch.equal(loaded(**batch(1))["scores"], program(**batch(1))["scores"])


def test_a_value_that_is_handed_over_stays(two: tuple[Translator, Program]) -> None:
    joined, parts = join(two[1])
    lost = joined.clone()
    next(node for node in lost.graph.nodes if HANDED in node.meta).meta.pop(HANDED)
    with pytest.raises(VerificationError, match="graph 'forward' has lost 'memory'"):
        split(lost, parts)
    around = joined.clone()
    handed = next(node for node in around.graph.nodes if HANDED in node.meta)
    user = next(node for node in handed.users if node.op == "call_function")
    user.replace_input_with(handed, handed.args[0])
    with pytest.raises(
        VerificationError, match="graph 'forward' reads the input 'ids' now, which only another"
    ):
        split(around, parts)


class Times(nn.Module):
    """An input times a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class AToB(Times):
    def forward(self, a: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"b": a * self.weight}


class BToA(Times):
    def forward(self, b: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"a": b * self.weight}


class BToC(Times):
    def forward(self, b: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"c": b * self.weight}


def test_graphs_that_do_not_fit_are_refused() -> None:
    there = bg.capture(AToB(), {"a": torch.randn(3, 4)})
    back = bg.capture(BToA(), {"b": torch.randn(3, 4)})
    there.add_graph("back", back)
    with pytest.raises(VerificationError, match="the graphs forward, back take each other's outputs"):
        check_program(there)
    other = bg.capture(AToB(), {"a": torch.randn(3, 4)})
    with pytest.raises(InputError, match="has a graph 'forward' already"):
        other.add_graph("forward", back)
    back.parameters["weight"] = 2 * back.parameters["weight"]
    with pytest.raises(InputError, match="graph 'back' reads 'weight' with other values"):
        other.add_graph("back", back)
    other.add_graph("back", bg.capture(BToC(), {"b": torch.randn(4)}))
    with pytest.raises(InputError, match=r"graph 'back' takes b: f32\[.*agree about its dtype and sizes"):
        join(other)
