"""Drop path and other written-out dropout is one node: drawn anew in every step, absent in eval form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import Torch
from bmgraph.training.optimizers import SGD

P = 0.25
X = torch.linspace(-1, 1, 24).view(2, 3, 4)

Drop = Callable[[torch.Tensor], torch.Tensor]


def added_and_floored(x: torch.Tensor) -> torch.Tensor:
    drawn = 1 - P + torch.rand((x.shape[0], 1, 1), dtype=x.dtype)
    return x.div(1 - P) * drawn.floor_()


def filled_in_place(x: torch.Tensor) -> torch.Tensor:
    drawn = x.new_empty((x.shape[0], 1, 1)).bernoulli_(1 - P)
    return x * drawn.div_(1 - P)


def whole_batch(x: torch.Tensor) -> torch.Tensor:
    return x * torch.empty((1, 1, 1)).bernoulli_(1 - P).div_(1 - P)


def below(x: torch.Tensor) -> torch.Tensor:
    return x * (torch.rand(x.shape[0], 1, 1) < 1 - P) / (1 - P)


def above(x: torch.Tensor) -> torch.Tensor:
    return x * ((torch.rand_like(x) > P).float() / (1 - P))


def of_probabilities(x: torch.Tensor) -> torch.Tensor:
    return torch.bernoulli(torch.full((x.shape[0], 1, 1), 1 - P)) * x / (1 - P)


def not_scaled(x: torch.Tensor) -> torch.Tensor:
    return x * x.new_empty((x.shape[0], 1, 1)).bernoulli_(1 - P)


def scaled_otherwise(x: torch.Tensor) -> torch.Tensor:
    return 2 * not_scaled(x)


def read_twice(x: torch.Tensor) -> torch.Tensor:
    drawn = x.new_empty((x.shape[0], 1, 1)).bernoulli_(1 - P) / (1 - P)
    return x * drawn + x.square() * drawn


class Branch(nn.Module):
    """A linear in a residual branch, dropped in training."""

    def __init__(self, drop: Drop) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(4, 4), drop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """f[B, S, 4] -> f[B, S, 4]."""
        branch: torch.Tensor = self.linear(x)
        return x + (self.drop(branch) if self.training else branch)


@pytest.mark.parametrize(
    ("drop", "dims"),
    [
        (added_and_floored, [0]),
        (filled_in_place, [0]),
        (whole_batch, []),
        (below, [0]),
        (above, [0, 1, 2]),
        (of_probabilities, [0]),
    ],
)
def test_a_written_out_dropout_is_one_node(drop: Drop, dims: list[int]) -> None:
    model = Branch(drop)
    program = bg.capture(model, (X,), prove="training")
    assert program.training == ""
    assert "equals" in program.backward
    (node,) = [item for item in program.graph.nodes if "dropout" in str(item.target)]
    assert node.args[1:] == (P, True, dims)
    assert not any(name in str(program) for name in ("rand", "bernoulli"))
    assert torch.equal(program(x=X)["output"], model.eval()(X))


@pytest.mark.parametrize("drop", [not_scaled, scaled_otherwise, read_twice])
def test_a_mask_that_is_no_dropout_is_not_trained(drop: Drop) -> None:
    program = bg.capture(Branch(drop), (X,))
    assert "draws random numbers (aten.bernoulli.p in the root module)" in program.training


@pytest.mark.parametrize("drop", [added_and_floored, filled_in_place])
def test_rows_are_kept_as_often_and_scaled_as_in_eager(drop: Drop) -> None:
    module = bg.capture(Branch(drop), (X,)).module(training=True)
    batch = torch.ones(4000, 1, 4)
    torch.manual_seed(0)
    branch = module(batch)[0] - batch
    whole = (module.get_parameter("linear.weight").sum(1) + module.get_parameter("linear.bias")) / (1 - P)
    kept = branch.abs().sum((1, 2)) > 0
    assert torch.allclose(branch[kept], whole.expand(int(kept.sum()), 1, 4), atol=1e-6)
    assert abs(float(kept.float().mean()) - (1 - P)) < 0.03


@pytest.mark.slow
def test_every_step_draws_anew_and_a_run_can_be_repeated() -> None:
    program = bg.capture(Branch(added_and_floored), (X,))

    def loss(
        outputs: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return outputs["output"].square().sum(), outputs["output"].new_ones(())

    def losses(seed: int) -> list[float]:
        trainer = bg.compile(program, backend=Torch(optimizer=SGD(lr=0.0), loss=loss, seed=seed))
        return [trainer.step({"x": X}).loss for _ in range(12)]

    first = losses(1)
    assert 2 <= len(set(first)) <= 4  # two rows, each kept or not
    assert first == losses(1)
    assert first != losses(2)
