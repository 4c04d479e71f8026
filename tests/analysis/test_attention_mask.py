"""Attention masks: recognized by the values they compute, however they are written, and only where that is proven."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

import bmgraph as bg
from bmgraph.analysis.attention_mask import Mask, read_mask
from bmgraph.backends.onnx.pack_attention import pack_attention
from bmgraph.ir.program import Program
from bmgraph.ir.tensor_spec import Range

Write = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

LOWEST = torch.finfo(torch.float32).min

PADDING, CAUSAL, BOTH, NOTHING = (
    Mask("attention_mask", False), Mask(None, True), Mask("attention_mask", True), Mask(None, False),
)  # fmt: skip


class Attend(nn.Module):
    """One attention with the mask that `write(x, attention_mask)` computes."""

    def __init__(self, write: Write, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.write, self.heads = write, heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (p(x).view(batch, length, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        mask = self.write(x, attention_mask)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        # use the mask, so that it stays an input even where the expression does not read it
        return mixed.transpose(1, 2).reshape(batch, length, width) * attention_mask[:, :, None]


def lower(x: torch.Tensor) -> torch.Tensor:
    places = torch.arange(x.shape[1])
    return places[None, :] <= places[:, None]


def shifted(seen: torch.Tensor) -> torch.Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, LOWEST)


def keys(m: torch.Tensor) -> torch.Tensor:
    return m.bool()[:, None, None, :]


def example() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(7)[None] < torch.tensor([7, 4, 6])[:, None]).long()
    return {"x": torch.randn(3, 7, 8, generator=generator), "attention_mask": mask}


def captured(write: Write) -> tuple[Program, fx.Node]:
    """A program and its mask node."""
    program = bg.capture(Attend(write).eval(), example(), prove=False)
    attention = next(
        node
        for node in program.graph.nodes
        if node.target is torch.ops.aten.scaled_dot_product_attention.default
    )
    mask = attention.args[3] if len(attention.args) > 3 else attention.kwargs["attn_mask"]
    assert isinstance(mask, fx.Node)
    return program, mask


READINGS: dict[str, tuple[Write, Mask | None]] = {
    "padding as truth": (lambda x, m: keys(m), PADDING),
    "padding for every query": (lambda x, m: keys(m).expand(-1, 1, x.shape[1], -1), PADDING),
    "padding by a product": (lambda x, m: (1.0 - m[:, None, None, :].float()) * LOWEST, PADDING),
    "padding by a fill": (lambda x, m: shifted(keys(m)), PADDING),
    "causal by comparison": (lambda x, m: lower(x)[None, None], CAUSAL),
    "causal by a triangle": (
        lambda x, m: torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)[None, None],
        CAUSAL,
    ),
    "both as truth": (lambda x, m: lower(x)[None, None] & keys(m), BOTH),
    "both by a sum": (lambda x, m: shifted(lower(x))[None, None] + shifted(keys(m)), BOTH),
    "nothing": (lambda x, m: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)[None, None], NOTHING),
    "padding the other way round": (lambda x, m: ~keys(m), None),
    "padding of queries": (lambda x, m: m.bool()[:, None, :, None], None),
    "anticausal": (lambda x, m: lower(x).T[None, None], None),
    "a window of 3": (
        lambda x, m: (lower(x) & (torch.arange(x.shape[1]) > torch.arange(x.shape[1])[:, None] - 3))[None, None],
        None,
    ),
    "a small bias": (lambda x, m: (1.0 - m[:, None, None, :].float()) * -2.0, None),
    "distance": (
        lambda x, m: -(torch.arange(x.shape[1])[None] - torch.arange(x.shape[1])[:, None]).abs().float()[None, None],
        None,
    ),
    "two inputs": (lambda x, m: keys(m) & (x[:, None, None, :, 0] > -9), None),
    "heads apart": (
        lambda x, m: torch.stack([lower(x), torch.ones_like(lower(x))])[None],
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READINGS)
def test_reading(name: str) -> None:
    write, expected = READINGS[name]
    program, mask = captured(write)
    assert read_mask(program, mask) == expected


def test_no_mask_hides_nothing() -> None:
    program, _ = captured(lambda x, m: keys(m))
    assert read_mask(program, None) == NOTHING


@pytest.mark.parametrize("window", [9, 12, 256])
def test_wide_window_is_not_causal(window: int) -> None:
    def write(x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1])
        return (lower(x) & (places[None, :] > places[:, None] - window))[None, None]

    program, mask = captured(write)
    assert read_mask(program, mask) is None


def test_a_short_batch_does_not_hide_a_window() -> None:
    """How many rows a batch may have is no bound of the lengths at which a mask is read."""

    def write(x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1])
        return (lower(x) & (places[None, :] > places[:, None] - 12))[None, None]

    program, mask = captured(write)
    program.ranges["batch"] = Range(1, 8)
    assert read_mask(program, mask) is None
    program.ranges["sequence"] = Range(1, 12)  # no sequence is as long as the window
    assert read_mask(program, mask) == CAUSAL


@pytest.mark.parametrize("hidden", [-1e4, torch.finfo(torch.float16).min])
def test_what_hides_a_key_is_no_length(hidden: float) -> None:
    """Older encoders add -10000, those in half precision -65504: neither is a length that has to be tried."""
    writes: list[Write] = [
        lambda x, m: (1.0 - m[:, None, None, :].float()) * hidden,
        lambda x, m: torch.zeros(keys(m).shape).masked_fill(~keys(m), hidden),
        lambda x, m: torch.where(keys(m), 0.0, hidden),
    ]
    for write in writes:
        program, mask = captured(write)
        assert read_mask(program, mask) == PADDING


@pytest.mark.parametrize(
    "write",
    [lambda x, m: (x[:, :, 0] > 0)[:, None, None, :], lambda x, m: (m != 5)[:, None, None, :]],
    ids=["floats", "padding token"],
)
def test_mask_of_other_values_is_not_read(write: Write) -> None:
    program, mask = captured(write)
    assert read_mask(program, mask) is None


def test_learned_mask_is_not_read() -> None:
    class Learned(Attend):
        def __init__(self) -> None:
            super().__init__(lambda x, m: self.table[None, None, : x.shape[1], : x.shape[1]])
            self.table = nn.Parameter(torch.zeros(16, 16))

    program = bg.capture(Learned().eval(), example(), prove=False)
    attention = next(
        node
        for node in program.graph.nodes
        if node.target is torch.ops.aten.scaled_dot_product_attention.default
    )
    assert read_mask(program, attention.args[3]) is None  # training may change it


@pytest.mark.parametrize("name", ["padding by a product", "causal by a triangle", "both as truth", "nothing"])
def test_packed_attention_computes_the_same(name: str) -> None:
    """Also at another length, and without the expression that computed the mask."""
    program, _ = captured(READINGS[name][0])
    generator = torch.Generator().manual_seed(1)
    batch = {
        "x": torch.randn(4, 13, 8, generator=generator),
        "attention_mask": (torch.arange(13)[None] < torch.tensor([13, 1, 9, 12])[:, None]).long(),
    }
    before = program(**batch)
    packed = program.clone()
    assert pack_attention(packed) == 1
    assert len(packed.graph.nodes) < len(program.graph.nodes)
    for key, expected in before.items():
        torch.testing.assert_close(packed(**batch)[key], expected, rtol=1e-5, atol=1e-5)


# a sum of two finite minima hides a key less than one of them: a query that sees no key averages some keys only
@pytest.mark.parametrize("name", ["distance", "a window of 3", "heads apart", "both by a sum"])
def test_attention_whose_mask_says_more_is_left(name: str) -> None:
    program, _ = captured(READINGS[name][0])
    before = str(program.graph)
    assert pack_attention(program) == 0
    assert str(program.graph) == before
