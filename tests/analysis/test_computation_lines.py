"""What a captured model computes with its weights: equal for other inputs, sizes and modes, not for other models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import BundleError
from bmgraph.ir.computation import Computation
from bmgraph.passes import Quantize

IDS = torch.tensor([[3, 4, 5, 6, 0], [7, 8, 9, 0, 0], [1, 2, 3, 4, 5]])
MASK = (IDS != 0).long()


class Toy(nn.Module):
    """A language model of one layer; its loss and its mask are there if labels and a mask are given."""

    def __init__(
        self,
        heads: int = 2,
        activation: Callable[[torch.Tensor], torch.Tensor] = nn.functional.silu,
        *,
        theta: float = 100.0,
        factor: float = 1.0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.activation, self.factor = heads, activation, factor
        self.table = nn.Embedding(11, 8)
        self.norm, self.drop = nn.LayerNorm(8), nn.Dropout(dropout)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 11)
        self.register_buffer("frequencies", theta ** -torch.arange(0, 1, 0.125), persistent=False)

    def forward(
        self,
        ids: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        embedded: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        x = self.table(ids) if embedded is None else embedded
        angles = torch.arange(x.shape[1])[:, None] * self.frequencies
        h = self.norm(x)
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, 8 // self.heads)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        seen = None if mask is None else (mask != 0)[:, None, None]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2)
        x = x + self.drop(self.o(mixed)) * self.factor
        x = x + self.down(self.activation(self.up(x * angles.cos())))
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


def computation(model: nn.Module, example: dict[str, torch.Tensor], *, dynamic: bool = True) -> Computation:
    return bg.capture(model, example, dynamic=dynamic, prove=False).computation


@pytest.fixture(scope="module")
def reference() -> Computation:
    return computation(Toy(), {"ids": IDS})


@pytest.mark.parametrize(
    "example",
    [
        {"ids": IDS, "mask": MASK},
        {"ids": IDS, "labels": IDS},
        {"ids": IDS[:1]},
        {"embedded": torch.randn(3, 5, 8)},
    ],
    ids=["mask", "loss", "one-row", "embedded"],
)
def test_other_inputs_are_the_same_model(reference: Computation, example: dict[str, torch.Tensor]) -> None:
    assert reference
    assert reference.difference(computation(Toy(), example)) == ""


def test_other_sizes_modes_and_dropout_are_the_same_model(reference: Computation) -> None:
    assert reference.difference(computation(Toy(), {"ids": IDS}, dynamic=False)) == ""
    assert reference.difference(computation(Toy().eval(), {"ids": IDS})) == ""
    assert reference.difference(computation(Toy(dropout=0.0), {"ids": IDS})) == ""


@pytest.mark.parametrize(
    ("other", "where"),
    [
        (lambda: Toy(heads=4), "'attention[2x4 2x4]("),
        (lambda: Toy(activation=nn.functional.relu), "'linear(silu("),
        (lambda: Toy(theta=10.0), "in front of up.weight '...inear(mul(linear o.weight, in "),
        (lambda: Toy(factor=0.5), "in front of up.weight 'linear(mul(linear o.weight, in "),
    ],
    ids=["heads", "activation", "table", "factor"],
)
def test_another_model_is_told_where(
    reference: Computation, other: Callable[[], nn.Module], where: str
) -> None:
    found = reference.difference(computation(other(), {"ids": IDS, "labels": IDS}))
    assert where in found


def test_weights_of_one_capture_alone_are_left_out() -> None:
    """A head that no output needs is not in the graph."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor, both: bool = False) -> tuple[torch.Tensor, ...]:
            h = self.one(x).relu()
            return (self.two(h), self.three(h)) if both else (self.three(h),)

    x = torch.randn(3, 4)
    one, both = (bg.capture(Two(), {"x": x, "both": flag}, prove=False).computation for flag in (False, True))
    assert one.lines != both.lines
    assert one.difference(both) == ""


def test_it_is_kept_by_passes_and_files(tmp_path: Path) -> None:
    program = bg.capture(Toy(), {"ids": IDS})
    small = bg.Pipeline([Quantize("int8", activations="none", smallest=8)]).run(program)
    assert small.computation == program.computation
    small.save(str(tmp_path / "small"))
    assert bg.load(tmp_path / "small").computation == program.computation


@pytest.mark.parametrize(
    "data", [[], {"lines": [1], "versions": {}}, {"lines": [], "versions": {"torch": 2}}]
)
def test_a_file_that_holds_something_else_is_refused(data: object) -> None:
    with pytest.raises(BundleError, match="must be a list of lines"):
        Computation.from_json(data)
