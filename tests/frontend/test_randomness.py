"""No eval form is random, and no program keeps one draw of a model's random numbers."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import CaptureError
from bmgraph.frontend.randomness import UNUSUAL_DRAWS


class Layer(nn.Module):
    """A linear whose contribution is scaled by `noise`, by so little that no comparison of outputs sees it."""

    def __init__(self, noise: Callable[[torch.Tensor, bool], torch.Tensor | float]) -> None:
        super().__init__()
        self.linear, self.noise = nn.Linear(4, 4), noise

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """f[B, 4] -> f[B, 4]."""
        return x + 1e-7 * self.linear(x) * self.noise(x, self.training)


def layer_drop(x: torch.Tensor, training: bool) -> float:
    return 0.0 if training and random.random() < 0.05 else 1e7


def numpy_layer_drop(x: torch.Tensor, training: bool) -> float:
    return 0.0 if training and np.random.rand() > 0.95 else 1e7


def drawn_in_vain(x: torch.Tensor, training: bool) -> float:
    return 0.0 if random.random() < 0.0 else 1e7


def noise(x: torch.Tensor, training: bool) -> torch.Tensor | float:
    return torch.rand(x.shape[0], 1) * 2.0 if training else 1.0


def always(x: torch.Tensor, training: bool) -> torch.Tensor:
    return torch.rand(x.shape[0], 1)


def dropout_in_eval(x: torch.Tensor, training: bool) -> torch.Tensor:
    return 1e7 * nn.functional.dropout(torch.ones_like(x), 0.5)


X = torch.linspace(-1, 1, 12).view(3, 4)


@pytest.mark.parametrize(
    ("noise", "reason"),
    [
        (layer_drop, "training mode the model is random: draws from Python's random"),
        (numpy_layer_drop, "training mode the model is random: draws from numpy.random"),
        (noise, r"eval form still draws random numbers \(aten.rand.default in the root module\)"),
        (drawn_in_vain, "^$"),
    ],
)
def test_random_numbers_of_training_that_no_graph_keeps(
    noise: Callable[[torch.Tensor, bool], torch.Tensor | float], reason: str
) -> None:
    random.seed(0)
    np.random.seed(0)  # the capture itself keeps the layer
    program = bg.capture(Layer(noise), (X,))
    assert re.search(reason, program.training)
    assert not any("rand" in str(node.target) for node in program.graph.nodes if program.training)
    assert torch.equal(program(x=X)["output"], program(x=X)["output"])


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (always, "still draws random numbers .*torch.nn.Dropout"),
        (dropout_in_eval, "in eval mode the model is random: two runs on the same inputs differ"),
        (
            lambda x, training: layer_drop(x, True),
            "draws from Python's random, of which a graph would keep one",
        ),
    ],
)
def test_a_model_that_is_random_in_eval_mode_is_told_so(
    noise: Callable[[torch.Tensor, bool], torch.Tensor | float], message: str
) -> None:
    with pytest.raises(CaptureError, match=message):
        bg.capture(Layer(noise).eval(), (X,))


def test_an_activation_that_is_random_in_training_is_not_in_eval_form() -> None:
    model = nn.Sequential(nn.RReLU(), nn.Linear(4, 4))
    program = bg.capture(model, (X,))
    assert torch.equal(program(input=X)["output"], model.eval()(X))


def test_the_seeds_draw_small_and_large_numbers() -> None:
    for (python, numpy), fits in zip(UNUSUAL_DRAWS, (lambda x: x < 0.03, lambda x: x > 0.97)):
        generator, other = random.Random(python), np.random.RandomState(numpy)
        assert all(fits(generator.random()) and fits(other.random()) for _ in range(3))
