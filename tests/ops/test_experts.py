"""The expert product operator: values, gradients and unread experts; balanced clusters and trained routers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bmgraph as bg
from bmgraph.ops.experts import experts_linear
from bmgraph.ops.quantization import dequantize
from bmgraph.passes.moefy.balanced_kmeans import EMPTY, balanced_clusters
from bmgraph.passes.moefy.router import Sample, retained_share, train_router, untrained_router
from bmgraph.verify.metrics import relative_error

EXPERTS, OUT, IN, ACTIVE = 5, 4, 6, 2


def naive(
    x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Gather all weights, then one product per choice."""
    shared = x if x.dim() > ids.dim() else x.unsqueeze(-2)
    made = (weight[ids] @ shared.unsqueeze(-1)).squeeze(-1)
    return made if bias is None else made + bias[ids]


def made(*leading: int, each: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight, ids and bias in float64."""
    ids = torch.randint(0, EXPERTS, (*leading, ACTIVE))
    x = torch.randn(*leading, *((ACTIVE,) if each else ()), IN, dtype=torch.double)
    weight = torch.randn(EXPERTS, OUT, IN, dtype=torch.double)
    return x, weight, ids, torch.randn(EXPERTS, OUT, dtype=torch.double)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("leading", [(1,), (7,), (2, 3), (0,)])
def test_it_equals_the_naive_form(leading: tuple[int, ...], each: bool) -> None:
    x, weight, ids, bias = made(*leading, each=each)
    assert torch.allclose(experts_linear(x, weight, ids, bias), naive(x, weight, ids, bias), atol=1e-12)
    assert torch.allclose(experts_linear(x, weight, ids), naive(x, weight, ids, None), atol=1e-12)


@pytest.mark.parametrize("each", [False, True])
def test_its_gradients_equal_those_of_the_naive_form(each: bool) -> None:
    x, weight, ids, bias = made(2, 3, each=each)
    seed = torch.randn(2, 3, ACTIVE, OUT, dtype=torch.double)
    found = []
    for product in (experts_linear, naive):
        leaves = [item.clone().requires_grad_() for item in (x, weight, bias)]
        (product(leaves[0], leaves[1], ids, leaves[2]) * seed).sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for one, other in zip(*found):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, atol=1e-12)


def test_torch_accepts_it() -> None:
    x, weight, ids, bias = made(2, 3, each=False)
    torch.library.opcheck(experts_linear, (x.requires_grad_(), weight.requires_grad_(), ids, bias))


def test_experts_that_nobody_chose_are_not_read() -> None:
    x, weight, _, bias = made(3, each=False)
    ids = torch.tensor([[0, 2], [2, 0], [0, 2]])
    weight[[1, 3, 4]] = torch.nan
    assert bool(torch.isfinite(experts_linear(x, weight, ids, bias)).all())


class Mixture(nn.Module):
    """A native mixture of experts that indexes its weights by ids; `spread`: tokens are repeated for each of their ids."""

    def __init__(self, spread: bool) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 12, 8)), nn.Parameter(torch.randn(4, 8, 6))
        self.spread = spread

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2 if self.spread else 1)
        flat = ids.reshape(-1) if self.spread else ids[:, 0]
        rows = x.repeat_interleave(2, 0) if self.spread else x
        gate, up = torch.bmm(self.up[flat], rows.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        made = torch.bmm(self.down[flat], (nn.functional.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (made * weights.reshape(-1, 1)).reshape(-1, ids.shape[1], 8).sum(1)


@pytest.mark.parametrize("spread", [False, True])
def test_the_canonical_form_of_a_native_mixture_uses_it(spread: bool) -> None:
    model, x = Mixture(spread), torch.randn(5, 8)
    program = bg.capture(model, {"x": x})
    products = [
        node for node in program.graph.nodes if node.target is torch.ops.bmgraph.experts_linear.default
    ]
    assert [node.args[1].target for node in products] == ["up", "down"]  # type: ignore[union-attr]
    assert torch.ops.aten.bmm.default not in {node.target for node in program.graph.nodes}
    assert relative_error(program(x=x)["output"], model(x)) < 1e-5
    (found,) = program.structure().experts
    assert (found.up, found.gate, found.down, found.split) == ("up", "up", "down", False)
    assert program.structure().role("router.weight") == "router"


def test_codes_of_experts_have_a_scale_for_each_output_of_each() -> None:
    codes = torch.randint(-127, 128, (EXPERTS, OUT, IN), dtype=torch.int8)
    scale = torch.rand(EXPERTS, OUT, dtype=torch.double, requires_grad=True)
    assert torch.equal(dequantize(codes, scale, 1), codes * scale[:, :, None])
    assert torch.autograd.gradcheck(lambda item: dequantize(codes, item, 1), (scale,))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 3))
def test_clusters_are_a_partition_into_equal_sizes(rows: int, count: int, seed: int) -> None:
    count = min(rows, count)
    groups = balanced_clusters(torch.randn(rows, 5), count, seed)
    assert groups.shape == (count, -(-rows // count))
    assert sorted(groups[groups != EMPTY].tolist()) == list(range(rows))


def test_clusters_hold_rows_that_point_the_same_way() -> None:
    centres = torch.nn.functional.normalize(torch.randn(4, 20), dim=1)
    rows = (centres[:, None] + 0.05 * torch.randn(4, 8, 20)).reshape(32, 20)[torch.randperm(32)]

    def cohesion(groups: torch.Tensor) -> float:
        return float(torch.nn.functional.normalize(rows, dim=1)[groups].mean(1).norm(dim=-1).mean())

    assert cohesion(torch.arange(32).reshape(4, 8)) < 0.7 < 0.85 < cohesion(balanced_clusters(rows, 4))


def test_a_trained_router_chooses_better_than_an_untrained_one() -> None:
    x = torch.randn(2000, 16)
    scores = torch.relu(x @ torch.randn(16, 8)) + 0.1
    trained, untrained = train_router(x[:1500], scores[:1500], 0), untrained_router(x, 8, 0)
    shares = [retained_share(scores[1500:], router(x[1500:]), 2) for router in (trained, untrained)]
    best = retained_share(scores[1500:], scores[1500:], 2)
    assert shares[1] < 0.5 < 0.9 * best < shares[0] <= best


def test_training_again_gives_the_same_bits() -> None:
    x, scores = torch.randn(300, 6), torch.rand(300, 4)
    one, other = train_router(x, scores, 3), train_router(x, scores, 3)
    assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("weight", "bias"))


def test_a_sample_is_bounded_and_spread_over_the_stream() -> None:
    sample = Sample(100)
    for start in range(0, 1000, 37):
        rows = torch.arange(start, min(1000, start + 37)).float()[:, None]
        sample.add(rows, rows)
    x, scores = sample.rows()
    assert 50 <= len(x) <= 100
    assert torch.equal(x, scores)
    assert len(x.flatten().diff().unique()) == 1
