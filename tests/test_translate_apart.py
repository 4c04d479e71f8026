"""Products with each expert apart, as ONNX engines: any choice gives what naive products give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.compare import relative_error

pytest.importorskip("onnxruntime")

OUT, IN, ACTIVE = 4, 6, 2
STEP, ZERO = 0.05, 120


class Products(nn.Module):
    """One product with chosen experts, of weights in floats or in codes beside rounded inputs."""

    def __init__(self, experts: int, rounding: str, biased: bool) -> None:
        super().__init__()
        self.rounding = rounding
        self.weight = nn.Parameter(torch.randn(experts, OUT, IN))
        self.codes = nn.Parameter(torch.randint(-127, 128, (experts, OUT, IN)).to(torch.int8), False)
        self.scale = nn.Parameter(torch.rand(experts, OUT) / 50)
        self.bias = nn.Parameter(torch.randn(experts, OUT)) if biased else None
        self.step = nn.Parameter(torch.tensor(STEP))
        self.zero_point = nn.Parameter(torch.tensor(ZERO, dtype=torch.uint8), False)

    def forward(self, x: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ours, ids = torch.ops.bmgraph, self.choice(scores)
        if self.rounding == "none":
            return ours.experts_linear(x, self.weight, ids, self.bias)  # type: ignore[no-any-return]
        how = (self.step, self.zero_point) if self.rounding == "static" else (None, None)
        codes = (self.codes, self.scale, ids, self.bias)
        return ours.experts_linear_rounded(x, *how, *codes)  # type: ignore[no-any-return]

    def choice(self, scores: torch.Tensor) -> torch.Tensor:
        """i64[..., ACTIVE], or one where there is one."""
        return scores.topk(min(ACTIVE, len(self.weight))).indices

    def naive(self, x: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Each row by itself."""
        weight, ids = self.weight, self.choice(scores)
        if self.rounding != "none":
            weight = self.codes * self.scale.unsqueeze(-1)
            step, zero = torch.tensor(STEP), torch.tensor(ZERO)
            if self.rounding == "dynamic":
                low, high = x.min().clamp(max=0), x.max().clamp(min=0)
                step = (high - low) / 255
                zero = (-low / step).round()
            x = ((x / step).round().add(zero).clamp(0, 255) - zero) * step
        rows = x if x.dim() > ids.dim() else x.unsqueeze(-2).expand(*ids.shape, IN)
        made = torch.empty(*ids.shape, OUT)
        for place in torch.cartesian_prod(*map(torch.arange, ids.shape)).tolist():
            at, expert = tuple(place), int(ids[tuple(place)])
            made[at] = weight[expert] @ rows[at] + (0 if self.bias is None else self.bias[expert])
        return made


@pytest.mark.parametrize("rounding", ["none", "static", "dynamic"])
@pytest.mark.parametrize(
    ("experts", "each", "biased"), [(5, False, True), (5, True, False), (1, False, False)]
)
def test_it_equals_naive_products(experts: int, each: bool, biased: bool, rounding: str) -> None:
    torch.manual_seed(0)
    model = Products(experts, rounding, biased)

    def batch(*leading: int) -> dict[str, torch.Tensor]:
        x = torch.randn(*leading, *((ACTIVE,) if each else ()), IN)
        return {"x": x, "scores": torch.randn(*leading, experts)}

    engine = bg.compile(model, passes=[], backend="onnx", example=batch(3, 4))
    for leading in ((1, 1), (2, 7), (40, 3)):
        given = batch(*leading)
        with torch.no_grad():
            assert relative_error(engine(**given)["output"], model.naive(**given)) < 1e-5
    given = batch(4, 2)
    given["scores"][..., -ACTIVE:] += 100  # all choose the same, and nobody the others
    with torch.no_grad():
        assert relative_error(engine(**given)["output"], model.naive(**given)) < 1e-5
