"""Blocks that the finder does not know are named, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.structure.unknown_sites import NEURONS, unknown_sites
from bmgraph.errors import PassError
from bmgraph.passes import Shrink

functional = nn.functional


class Block(nn.Module):
    """A known feed-forward, one with any function inside, and a head of another size."""

    def __init__(self, inside: Callable[[torch.Tensor], torch.Tensor], share: int = 1) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16 // share, 8)
        self.norm, self.head, self.inside = nn.LayerNorm(8), nn.Linear(8, 8), inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """f[B, S, 8] -> f[B, S, 8]."""
        x = x + self.down(self.up(x).relu())
        x = x + self.last(self.inside(self.first(self.norm(x))))
        return self.head(self.norm(x))


@pytest.mark.parametrize(
    ("inside", "share"),
    [
        (lambda x: functional.glu(x, -1), 2),
        (lambda x: x.softmax(-1), 1),
        (lambda x: functional.prelu(x, torch.tensor([0.3])), 1),
        (lambda x: functional.avg_pool1d(x, 3, 1, 1), 1),
    ],
)
def test_a_feed_forward_that_is_not_known_is_declined_by_name(
    inside: Callable[[torch.Tensor], torch.Tensor], share: int
) -> None:
    program = bg.capture(Block(inside, share), (torch.randn(2, 5, 8),))
    found = find(program)
    assert [site.down for site in found.feedforwards] == ["down.weight"]
    assert {name: site.kind for name, site in unknown_sites(program, found).items()} == {
        "last.weight": NEURONS
    }
    record = bg.Pipeline([Shrink(ffn=0.5)]).run(program).history[-1]
    assert "last.weight" in {edit.site for edit in record.declined}
    assert {edit.site for edit in record.edits} == {"down.weight"}


class Attention(nn.Module):
    """Two heads whose scores go through any function, beside a known feed-forward."""

    def __init__(self, inside: Callable[[torch.Tensor], torch.Tensor], way: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.inside, self.way = inside, way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """f[B, S, 8] -> f[B, S, 8]."""
        q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        if self.way == "einsum":
            mixed = torch.einsum("bhqk,bhkd->bhqd", self.inside(torch.einsum("bhqd,bhkd->bhqk", q, k)), v)
        else:
            mixed = self.inside(q @ k.transpose(-1, -2)) @ v
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu())


@pytest.mark.parametrize("way", ["matmul", "einsum"])
@pytest.mark.parametrize("inside", [torch.relu, torch.sigmoid, lambda scores: scores.relu().square()])
def test_an_attention_without_softmax_is_declined_by_name(
    inside: Callable[[torch.Tensor], torch.Tensor], way: str
) -> None:
    program = bg.capture(Attention(inside, way), (torch.randn(2, 5, 8),))
    record = bg.Pipeline([Shrink(ffn=0.5, heads=0.5)]).run(program).history[-1]
    assert {edit.site: edit.what for edit in record.declined} == {
        "o.weight": "an attention without softmax ends there: its heads are not known"
    }
    with pytest.raises(PassError, match=r"changed nothing \(o\.weight: an attention without softmax"):
        bg.Pipeline([Shrink(heads=0.5)]).run(program)


def test_known_blocks_and_heads_are_none(program: bg.Program) -> None:
    assert unknown_sites(program, find(program)) == {}
