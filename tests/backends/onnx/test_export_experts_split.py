"""Expert products exported as one product per expert: every choice of experts equals naive products."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.ops.block_codes import pack_codes
from bmgraph.verify.metrics import relative_error

pytest.importorskip("onnxruntime")

OUT, ACTIVE, BLOCK = 4, 2, 16
FEATURES = {
    "floats": 6,
    "static": 6,
    "dynamic": 6,
    "rows": 6,
    "blocks": 2 * BLOCK,
    "codes alone": BLOCK + 4,
    "int4": 2 * BLOCK,
    "int4 alone": BLOCK + 4,
}
"""Input features for each kind of quantization; those of codes alone are not a multiple of the block size."""
BITS = {"blocks": 8, "codes alone": 8, "int4": 4, "int4 alone": 4}
"""The bits of codes of blocks."""
ALONE = ("floats", "codes alone", "int4 alone")
"""Kinds that do not round the input."""
STEP, OFFSET = 0.05, 120


class Products(nn.Module):
    """One product with chosen experts; weights in float or in int8."""

    def __init__(self, experts: int, rounding: str, biased: bool) -> None:
        super().__init__()
        self.rounding, self.features = rounding, FEATURES[rounding]
        self.weight = nn.Parameter(torch.randn(experts, OUT, self.features))
        bits = BITS.get(rounding, 8)
        largest = 2 ** (bits - 1) - 1
        codes = torch.randint(-largest, largest + 1, self.weight.shape)
        self.codes = nn.Parameter(codes.to(torch.int8), False)
        self.scale = nn.Parameter(torch.rand(experts, OUT) / 50)
        self.bias = nn.Parameter(torch.randn(experts, OUT)) if biased else None
        self.step = nn.Parameter(torch.tensor(STEP))
        self.zero_point = nn.Parameter(torch.tensor(OFFSET, dtype=torch.uint8), False)
        blocks = -(-self.features // BLOCK)
        self.blocks = nn.Parameter(pack_codes(self.codes.detach(), bits, BLOCK), False)
        self.scales = nn.Parameter(self.scale.detach().unsqueeze(-1).repeat(1, 1, blocks))

    def forward(self, x: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ours, ids = torch.ops.bmgraph, self.choice(scores)
        made: torch.Tensor
        if self.rounding == "floats":
            made = ours.experts_linear(x, self.weight, ids, self.bias)
        elif self.rounding in BITS:
            how = (BITS[self.rounding], self.features, self.rounding not in ALONE)
            made = ours.experts_linear_blocks(x, self.blocks, self.scales, ids, self.bias, *how)
        else:
            step = (self.step, self.zero_point) if self.rounding == "static" else (None, None)
            rows = self.rounding == "rows"
            made = ours.experts_linear_rounded(x, *step, self.codes, self.scale, ids, self.bias, rows)
        return made

    def choice(self, scores: torch.Tensor) -> torch.Tensor:
        """The chosen experts, i64[..., ACTIVE], or i64[..., 1] where there is one expert."""
        return scores.topk(min(ACTIVE, len(self.weight))).indices

    def naive(self, x: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """One product per row."""
        ids, x = self.choice(scores), self.rounded(x)
        weight = self.weight if self.rounding == "floats" else self.codes * self.scale.unsqueeze(-1)
        rows = x if x.dim() > ids.dim() else x.unsqueeze(-2).expand(*ids.shape, self.features)
        made = torch.empty(*ids.shape, OUT)
        for place in torch.cartesian_prod(*map(torch.arange, ids.shape)).tolist():
            at, expert = tuple(place), int(ids[tuple(place)])
            made[at] = weight[expert] @ rows[at] + (0 if self.bias is None else self.bias[expert])
        return made

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """The input of the product, rounded where activations are."""
        if self.rounding in ALONE:
            return x
        if self.rounding in BITS or self.rounding == "rows":
            parts = x.unflatten(-1, (-1, BLOCK if self.rounding in BITS else self.features))
            step = parts.abs().amax(-1, keepdim=True) / 127
            return ((parts / step).round() * step).flatten(-2)
        step, zero = torch.tensor(STEP), torch.tensor(float(OFFSET))
        if self.rounding == "dynamic":
            low, high = x.min().clamp(max=0), x.max().clamp(min=0)
            step = (high - low) / 255
            zero = (-low / step).round()
        return ((x / step).round().add(zero).clamp(0, 255) - zero) * step


@pytest.mark.parametrize("rounding", list(FEATURES))
@pytest.mark.parametrize(
    ("experts", "each", "biased"), [(5, False, True), (5, True, False), (1, False, False)]
)
def test_it_equals_naive_products(experts: int, each: bool, biased: bool, rounding: str) -> None:
    torch.manual_seed(0)
    model = Products(experts, rounding, biased)

    def batch(*leading: int) -> dict[str, torch.Tensor]:
        x = torch.randn(*leading, *((min(ACTIVE, experts),) if each else ()), model.features)
        return {"x": x, "scores": torch.randn(*leading, experts)}

    engine = bg.compile(model, passes=[], backend="onnx", example=batch(3, 4))
    for leading in ((1, 1), (2, 7), (40, 3)):
        given = batch(*leading)
        with torch.no_grad():
            assert relative_error(engine(**given)["output"], model.naive(**given)) < 1e-5
    given = batch(4, 2)
    given["scores"][..., -ACTIVE:] += 100  # all rows choose the same experts; the others stay empty
    with torch.no_grad():
        assert relative_error(engine(**given)["output"], model.naive(**given)) < 1e-5
