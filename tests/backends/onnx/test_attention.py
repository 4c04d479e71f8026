"""Attention on ONNX Runtime: of any rank, with any mask that torch broadcasts, and where a query sees no key."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bmgraph as bg
from bmgraph.backends import Onnx
from bmgraph.ir.program import Program
from bmgraph.runtime.ort.engine import OrtEngine
from bmgraph.verify.metrics import relative_error

WIDTH, HEADS = 8, 2

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""q, k, v [B, H, S, d] and padding bool[B, S] -> [B, H, S, d]."""


def _written(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-1, -2) / 2 + added).softmax(-1) @ v


def _added(real: torch.Tensor, value: float) -> torch.Tensor:
    return (1 - real[:, None, None].float()) * value


def _causal(real: torch.Tensor) -> torch.Tensor:
    return real[:, None, None] & torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()


LEAST = torch.finfo(torch.float32).min

MASKS: dict[str, Attend] = {
    "booleans": lambda q, k, v, real: F.scaled_dot_product_attention(q, k, v, real[:, None, None]),
    "infinity": lambda q, k, v, real: F.scaled_dot_product_attention(
        q, k, v, torch.zeros(real.shape).masked_fill(~real, -torch.inf)[:, None, None]
    ),
    "the least number": lambda q, k, v, real: _written(q, k, v, _added(real, LEAST)),
    "a billion": lambda q, k, v, real: _written(q, k, v, _added(real, -1e9)),
    "causal booleans": lambda q, k, v, real: F.scaled_dot_product_attention(q, k, v, _causal(real)),
    "the least number, causal": lambda q, k, v, real: _written(
        q, k, v, torch.where(_causal(real), 0.0, LEAST)
    ),
    "a billion, causal": lambda q, k, v, real: _written(q, k, v, torch.where(_causal(real), 0.0, -1e9)),
}


class Attention(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.attend = nn.Embedding(20, WIDTH), attend
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        q, k, v = (item(x).view(*ids.shape, HEADS, -1).transpose(1, 2) for item in (self.q, self.k, self.v))
        return self.o(self.attend(q, k, v, mask != 0).transpose(1, 2).reshape(*ids.shape, WIDTH))


def _batch(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    mask = torch.tensor(rows)
    generator = torch.Generator().manual_seed(mask.numel())
    return {"ids": torch.randint(20, mask.shape, generator=generator), "mask": mask}


@pytest.mark.parametrize("kind", MASKS)
def test_queries_that_see_no_key(kind: str) -> None:
    """A row of padding alone, and padding in front, which hides all that the first causal queries may see."""
    model = Attention(MASKS[kind]).eval()
    engine = bg.compile(model, passes=[], example=_batch([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]), backend="onnx")
    assert dict(engine.report.rewrites).get("pack_attention") == (0 if kind == "a billion, causal" else 1)
    for rows in ([[0, 0, 0, 0], [1, 1, 1, 0]], [[0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 1, 0]]):
        batch = _batch(rows)
        with torch.no_grad():
            assert relative_error(engine(**batch)["output"], model(**batch)) < 1e-4


@pytest.mark.parametrize("kind", ["the least number", "the least number, causal", "infinity"])
def test_queries_that_see_no_key_where_attention_is_not_packed(kind: str) -> None:
    """ONNX Runtime takes the least number of a dtype for -inf."""
    model = Attention(MASKS[kind]).eval()
    engine = bg.compile(
        model, passes=[], example=_batch([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]), backend=Onnx(optimise=False)
    )
    batch = _batch([[0, 0, 0, 0], [0, 1, 1, 0]])
    with torch.no_grad():
        assert relative_error(engine(**batch)["output"], model(**batch)) < 1e-4


class Broadcast(nn.Module):
    """Masks that are broadcast along keys, or along both axes; heads 2, positions up to 9."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.slope = nn.Parameter(torch.randn(HEADS))

    def forward(self, x: torch.Tensor, real: torch.Tensor) -> dict[str, torch.Tensor]:
        def attend(mask: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(x, x, x, mask)

        return {
            "one per query": attend(real[:, None, :, None]),
            "one per head": attend(self.slope[:, None, None] > -9),
        }


def test_masks_of_one_key_column() -> None:
    batch = {"x": torch.randn(2, HEADS, 5, 4), "real": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]) != 0}
    _compare(
        Broadcast(), batch, {"x": torch.randn(3, HEADS, 7, 4), "real": torch.ones(3, 7, dtype=torch.bool)}
    )


class WithoutHeads(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        bias = x[..., :1].transpose(-1, -2)
        return {
            "three axes": F.scaled_dot_product_attention(x, x, x),
            "causal": F.scaled_dot_product_attention(x, x + 1, x, is_causal=True),
            "with a mask": F.scaled_dot_product_attention(x, x, x, bias.expand(-1, x.shape[1], -1)),
            "written out": (x @ x.transpose(1, 2) / 3 + bias).softmax(-1) @ x,
            "two axes": F.scaled_dot_product_attention(x[0], x[0], x[0]),
        }


def test_attention_without_heads() -> None:
    _compare(WithoutHeads(), {"x": torch.randn(2, 5, 4)}, {"x": torch.randn(3, 7, 4)})


class Prefix(nn.Module):
    """Causal attention of fewer queries than keys: torch lets the first query see the first key."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            item.view(*item.shape[:2], HEADS, -1).transpose(1, 2)
            for item in (self.q(x), self.k(y), self.v(y))
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return attended.transpose(1, 2).reshape(*x.shape[:2], WIDTH)


def test_causal_attention_of_fewer_queries_than_keys() -> None:
    batch = {"x": torch.randn(2, 3, WIDTH), "y": torch.randn(2, 5, WIDTH)}
    _compare(Prefix(), batch, {"x": torch.randn(1, 4, WIDTH), "y": torch.randn(1, 6, WIDTH)})


def _compare(model: nn.Module, *batches: dict[str, torch.Tensor]) -> tuple[Program, OrtEngine]:
    program = bg.capture(model.eval(), batches[0])
    engine = bg.compile(program, passes=[], backend="onnx")
    for batch in batches:
        with torch.no_grad():
            expected = torch.utils._pytree.tree_leaves(model(**batch))
        for runner in (program, engine):
            for found, value in zip(runner(**batch).values(), expected, strict=True):
                assert relative_error(found, value) < 1e-5
    return program, engine
