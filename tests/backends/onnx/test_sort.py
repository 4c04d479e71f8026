"""Stable sorts on ONNX Runtime: equal values stay in their order, in every type."""

from __future__ import annotations

import torch
from torch import nn

import bmgraph as bg

TYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
)


class Sorts(nn.Module):
    """Sorts a few values of each type, so that most are equal, in both directions and along both axes."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for dtype in TYPES:
            for dim, descending in ((-1, False), (0, True)):
                values, indices = x.to(dtype).sort(dim=dim, descending=descending, stable=True)
                found[f"{dtype} {dim}"], found[f"{dtype} {dim} at"] = values, indices
        found["order"] = torch.argsort(x, dim=1, descending=True, stable=True)
        return found


def test_a_stable_sort_is_translated() -> None:
    x = torch.randint(0, 3, (5, 40), generator=torch.Generator().manual_seed(0)).float()
    engine = bg.compile(Sorts(), example={"x": x[:3, :9]}, backend="onnx")
    expected, found = Sorts()(x), engine(x=x)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(found[name]), value), name
