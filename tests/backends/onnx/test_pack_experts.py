"""Which expert feed-forwards a kernel takes: those that it computes exactly, of experts that are distinct."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import bmgraph as bg
from bmgraph.backends.onnx.pack_experts import MAX_SPLIT_EXPERTS, pack_experts
from bmgraph.ir.program import Program
from bmgraph.lowering.to_exported_program import deployed
from bmgraph.passes import Quantize
from bmgraph.verify.metrics import relative_error

EXPERTS, WIDTH = MAX_SPLIT_EXPERTS + 1, 16


class Mixture(nn.Module):
    """Expert feed-forwards with equal weights; the three that a router chooses, or its first choice twice."""

    def __init__(self, approximate: str | None = None, distinct: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.approximate, self.distinct, self.router = approximate, distinct, nn.Linear(WIDTH, EXPERTS)
        self.up, self.down = (nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / 4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids = self.router(x).topk(3 if self.distinct else 2, -1).indices
        ids = ids if self.distinct else torch.cat([ids, ids[:, :1]], -1)
        hidden = torch.ops.bmgraph.experts_linear(x, self.up, ids)
        hidden = F.relu(hidden) if self.approximate is None else F.gelu(hidden, approximate=self.approximate)
        return torch.ops.bmgraph.experts_linear(hidden, self.down, ids).sum(-2)  # type: ignore[no-any-return]


def _captured(approximate: str | None = None, distinct: bool = True) -> Program:
    return bg.capture(Mixture(approximate, distinct), {"x": torch.randn(5, WIDTH)})


def test_experts_that_may_repeat_are_not_one_mixture() -> None:
    assert pack_experts(deployed(_captured()))[0] == 1
    program = _captured(distinct=False)
    engine = bg.compile(program, passes=[], backend="onnx")
    x = torch.randn(4, WIDTH)
    assert relative_error(engine(x=x)["output"], program(x=x)["output"]) < 1e-5


def test_a_gelu_that_the_kernel_does_not_have_is_not_replaced() -> None:
    for approximate, count in (("tanh", 1), ("none", 0)):
        coded = bg.Pipeline([Quantize("int8", activations="none", smallest=1)]).run(_captured(approximate))
        assert pack_experts(deployed(coded))[0] == count
