"""Coupled dimensions: where units propagate, what blocks them, and that removing units equals zeroing them."""

from __future__ import annotations

from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import bmgraph as bg
from bmgraph.analysis.coupling.coupled_dims import NONE, Coupling, CouplingError, Spread
from bmgraph.analysis.coupling.op_rules import WHOLE
from bmgraph.analysis.weight_sites import linears, weight_of
from bmgraph.ir.program import Program
from bmgraph.passes.shrink.slice_program import remove_units
from bmgraph.verify.metrics import relative_error
from tests.analysis.structure.test_structure import WIDTH, Attention
from tests.helpers.models import tokens

EXACT = 1e-5


def linear(program: Program, site: str) -> fx.Node:
    """The first use of a linear."""
    return next(
        node
        for node in linears(program.graph)
        if (weight := weight_of(program, node)) is not None and weight.site == site
    )


def spread(program: Program, site: str, labels: Any) -> Spread:
    """Where units that start at the outputs of a linear propagate."""
    node = linear(program, site)
    return Coupling(program).spread({(node, node.meta["val"].dim() - 1): torch.as_tensor(labels)})


def reached(found: Spread) -> dict[str, dict[int, list[int]]]:
    """Parameter -> dimension -> the unit of each index."""
    tensors: dict[str, dict[int, list[int]]] = {}
    for (node, dim), labels in found.labels.items():
        if node.op == "get_attr":
            tensors.setdefault(str(node.target), {})[dim] = labels.tolist()
    return tensors


class Gated(nn.Module):
    """A gated feed-forward with every operator that may occur inside one."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused
        self.up, self.gate, self.down = nn.Linear(4, 6), nn.Linear(4, 6, bias=False), nn.Linear(6, 4)
        self.both = nn.Linear(4, 12)
        self.scale, self.norm, self.drop = nn.Parameter(torch.randn(6)), nn.LayerNorm(6), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fused:
            up, gate = self.both(x).chunk(2, -1)
        else:
            up, gate = self.up(x), self.gate(x)
        hidden = nn.functional.silu(gate) * up * self.scale
        return self.down(self.drop(hidden if self.fused else self.norm(hidden)))


def test_a_gated_feed_forward_is_coupled_with_all_that_lies_within() -> None:
    program = bg.capture(Gated(), {"x": torch.randn(3, 4)})
    units = list(range(6))
    assert reached(spread(program, "up.weight", units)) == {
        "up.weight": {0: units}, "up.bias": {0: units}, "gate.weight": {0: units}, "scale": {0: units},
        "norm.weight": {0: units}, "norm.bias": {0: units}, "down.weight": {1: units},
    }  # fmt: skip
    fused = bg.capture(Gated(fused=True), {"x": torch.randn(3, 4)})
    assert reached(spread(fused, "both.weight", [*units, *[NONE] * 6])) == {
        "both.weight": {0: units * 2}, "both.bias": {0: units * 2}, "scale": {0: units}, "down.weight": {1: units},
    }  # fmt: skip


def test_units_stay_within_their_connected_component() -> None:
    program = bg.capture(Gated(), {"x": torch.randn(3, 4)})
    graph = Coupling(program).graph
    inner = nx.subgraph_view(graph, filter_node=lambda place: place[1] != WHOLE)
    components = [{(node.name, dim) for node, dim in found} for found in nx.connected_components(inner)]
    found = {(node.name, dim) for (node, dim) in spread(program, "up.weight", list(range(6))).labels}
    assert found in components
    assert {("linear_2", 1), ("down_weight", 0), ("down_bias", 0)} in components


@pytest.mark.parametrize("fused", [False, True])
def test_heads_that_share_keys_go_together(fused: bool) -> None:
    """Four query heads of size 4 share two key and value heads."""
    program = bg.capture(Attention(fused=fused, kv=2), (torch.randn(2, 6, WIDTH),))
    attention = program.structure().attentions[0]
    assert (attention.heads, attention.kv_heads, attention.head_size) == (4, 2, 4)
    assert attention.k is not None
    width = linear(program, attention.k.linear).meta["val"].shape[-1]
    seeds = torch.full((width,), NONE)
    for start, stop in attention.k.runs:
        seeds[start:stop] = torch.arange(stop - start) // 4
    tensors = reached(spread(program, attention.k.linear, seeds))
    queries, keys = [0] * 8 + [1] * 8, [0] * 4 + [1] * 4
    assert tensors[attention.o or ""][1] == queries
    if fused:
        assert tensors[attention.k.linear][0] == queries + keys + keys
    else:
        assert [tensors[part.linear][0] for part in (attention.q, attention.k, attention.v) if part] == [
            queries, keys, keys,
        ]  # fmt: skip


class Biased(nn.Module):
    """Two attentions that share one position bias per head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.bias = nn.Embedding(20, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1])
        bias = self.bias((places[:, None] - places[None]).abs()).permute(2, 0, 1)[None]
        for _ in range(2):
            q, k, v = (
                p(x).reshape(x.shape[0], x.shape[1], 2, 4).transpose(1, 2) for p in (self.q, self.k, self.v)
            )
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, bias)
            x = x + self.o(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], 8))
        return x


def test_a_bias_that_others_read_is_picked_from() -> None:
    x = torch.randn(2, 5, 8)
    program = bg.capture(Biased(), {"x": x})
    found = spread(program, "k.weight", [0] * 4 + [1] * 4)
    assert "bias.weight" not in reached(found)
    assert len(found.cuts) == 2  # both uses
    silent = program.clone()
    silent.parameters["o.weight"] = program.parameters["o.weight"].clone()
    silent.parameters["o.weight"][:, :4] = 0
    expected = silent(x=x)["output"]
    remove_units(program, found, [0], "test", "o.weight")
    assert program.parameters["q.weight"].shape == (4, 8)
    assert program.parameters["bias.weight"].shape == (20, 2)
    assert relative_error(program(x=x)["output"], expected) < EXACT


class Odd(nn.Module):
    """A feed-forward with a given function between its linears."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.up, self.between, self.down = nn.Linear(4, 6), between, nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.between(self)(self.up(x))


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (lambda own: lambda h: own.down(h.softmax(-1)), "operator softmax needs all of them"),
        (lambda own: lambda h: own.down(h.roll(1, -1)), "operator roll needs all of them"),
        (lambda own: lambda h: own.down(h.sort(-1).values), "operator sort needs all of them"),
        (lambda own: lambda h: (own.down(h), h), "they are an output of the program"),
        (lambda own: lambda h: own.down(h) + h[:, 2:3], "operator slice needs all of them"),
        (lambda own: lambda h: own.down(h + h.flip(-1)), "operator flip needs all of them"),
        (lambda own: lambda h: own.down(torch.cat([h[:, ::2], h[:, 1::2]], -1)), "operator slice needs all of them"),
    ],
)  # fmt: skip
def test_operators_that_block_removal_are_reported(between: Any, message: str) -> None:
    program = bg.capture(Odd(between), {"x": torch.randn(3, 4)})
    with pytest.raises(CouplingError, match=message):
        spread(program, "up.weight", list(range(6)))


def test_mixed_units_are_reported() -> None:
    """Adding the neurons in reverse order would couple the first with the last."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.up(x)
            return self.down(h + torch.cat([h[:, 3:], h[:, :3]], -1))

    program = bg.capture(Mixed(), {"x": torch.randn(3, 4)})
    with pytest.raises(CouplingError, match="mixes several of them"):
        spread(program, "up.weight", list(range(6)))


@settings(max_examples=12, deadline=None)
@given(neurons=st.sets(st.integers(0, 63), max_size=63), heads=st.sets(st.integers(0, 3), max_size=3))
def test_removing_units_equals_zeroing_them(program: Program, neurons: set[int], heads: set[int]) -> None:
    program = program.clone()
    silent = program.clone()
    for site, columns in (
        ("blocks.0.down.weight", sorted(neurons)),
        ("blocks.1.o.weight", [8 * head + place for head in heads for place in range(8)]),
    ):
        silent.parameters[site] = program.parameters[site].clone()
        silent.parameters[site][:, columns] = 0
    remove_units(program, spread(program, "blocks.0.up.weight", list(range(64))), neurons, "test", "down")
    units = [place // 8 for place in range(32)]
    remove_units(program, spread(program, "blocks.1.v.weight", units), heads, "test", "o")
    assert program.parameters["blocks.0.up.weight"].shape == (64 - len(neurons), 32)
    assert program.parameters["blocks.1.q.weight"].shape == (32 - 8 * len(heads), 32)
    for batch in (tokens(), tokens(5, 11, 1)):
        assert relative_error(program(**batch)["logits"], silent(**batch)["logits"]) < EXACT


class HashRouted(nn.Module):
    """Experts chosen by the id alone, whose output, made in front of every linear, scales the neurons behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.experts = nn.Embedding(11, 8), nn.Parameter(torch.randn(4, 12, 8))
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        scale = torch.ops.bmgraph.experts_linear(x, self.experts, (ids % 4)[:, None])[:, 0]
        return self.down(self.up(x).relu() * scale)  # type: ignore[no-any-return]


def test_experts_in_front_of_every_linear_are_a_side_input_that_stays_whole() -> None:
    ids = torch.randint(11, (7,), generator=torch.Generator().manual_seed(0))
    program = bg.capture(HashRouted().eval(), (ids,))
    found, silent = spread(program, "up.weight", range(12)), program.clone()
    assert {dim for (_, _, dim) in found.cuts} == {1}
    silent.parameters["down.weight"] = program.parameters["down.weight"].clone()
    silent.parameters["down.weight"][:, [0, 5, 11]] = 0
    remove_units(program, found, [0, 5, 11], "test", "down.weight")
    assert program.parameters["up.weight"].shape == (9, 8)
    assert program.parameters["experts"].shape == (4, 12, 8)
    assert relative_error(program(ids=ids)["output"], silent(ids=ids)["output"]) < EXACT
