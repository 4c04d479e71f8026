"""What Shrink compares units by: each score against a naive form, in each site and over all."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import InputError, PassError, ResourceError
from bmgraph.ir.program import Program
from bmgraph.passes import Shrink


class Stream(nn.Module):
    """Two residual feed-forwards with a loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ups = nn.ModuleList(nn.Linear(6, 10) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(10, 6) for _ in range(2))
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """x f[B, S, 6], labels i64[B, S] -> hidden f[B, S, 6], loss f[]."""
        for up, down in zip(self.ups, self.downs):
            x = x + down(torch.relu(up(x)))
        return {"hidden": x, "loss": self.loss(x, labels)}

    def loss(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """x f[B, S, 6], labels i64[B, S] -> f[]."""
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


BATCHES = [
    {
        "x": torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(seed)),
        "labels": torch.randint(0, 4, (3, 5), generator=torch.Generator().manual_seed(seed)),
    }
    for seed in range(3)
]


@pytest.fixture(scope="module")
def stream() -> tuple[Stream, Program]:
    model = Stream()
    return model, bg.capture(model, BATCHES[0])


def hidden(model: Stream, batch: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The values of all neurons, as leaves of the loss."""
    x, neurons = batch["x"], []
    for up, down in zip(model.ups, model.downs):
        neurons.append(torch.relu(up(x)).detach().requires_grad_() if not neurons else torch.relu(up(x)))
        neurons[-1].retain_grad()
        x = x + down(neurons[-1])
    return neurons, model.loss(x, batch["labels"])


def naive(model: Stream, score: str) -> list[torch.Tensor]:
    found = [torch.zeros(10, dtype=torch.double) for _ in range(2)]
    for batch in BATCHES:
        neurons, loss = hidden(model, batch)
        loss.backward()
        for place, value in enumerate(neurons):
            if score == "taylor":
                assert value.grad is not None
                found[place] += (value * value.grad).double().sum(1).abs().sum(0).detach()
            else:
                gain = model.downs[place].weight.double().square().sum(0)
                found[place] += (value.double().square().sum((0, 1)) * gain).detach()
    return [item / item.mean() for item in found] if score == "activation" else found


def left(model: Stream, program: Program) -> list[list[int]]:
    """The neurons of each feed-forward that a program kept."""
    return [
        [
            place
            for place, value in enumerate(up.bias.tolist())
            if value in program.parameters[f"ups.{number}.bias"].tolist()
        ]
        for number, up in enumerate(model.ups)
    ]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("score", ["activation", "taylor"])
def test_scores_are_those_of_a_naive_form(stream: tuple[Stream, Program], score: str, scope: str) -> None:
    model, program = stream
    small = bg.Pipeline([Shrink(ffn=0.4, score=score, scope=scope)]).run(program, calibration=BATCHES)
    scores = naive(model, score)
    if scope == "layer":
        expected = [sorted(item.argsort()[4:].tolist()) for item in scores]
    else:
        ranked = torch.cat(scores).argsort()[8:].tolist()
        expected = [
            sorted(place - 10 * number for place in ranked if place // 10 == number) for number in range(2)
        ]
    assert left(model, small) == expected
    assert expected != left(model, bg.Pipeline([Shrink(ffn=0.4, scope=scope)]).run(program))


def test_random_units_are_those_of_the_seed(stream: tuple[Stream, Program]) -> None:
    model, program = stream
    found = [
        left(model, bg.Pipeline([Shrink(ffn=0.4, score="random", seed=seed)]).run(program))
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]
    assert found[0][0] != found[0][1]


def test_channels_are_scored_by_what_reads_them() -> None:
    """Channels that no linear reads with any weight go first."""
    quiet = Stream()
    with torch.no_grad():
        for linear in (*quiet.ups, quiet.head):
            linear.weight[:, [1, 4]] = 0
    program = bg.capture(quiet, BATCHES[0])
    small = bg.Pipeline([Shrink(hidden=0.34, score="activation")]).run(program, calibration=BATCHES)
    bias = small.parameters["downs.0.bias"].tolist()
    assert [place for place, value in enumerate(quiet.downs[0].bias.tolist()) if value in bias] == [
        0,
        2,
        3,
        5,
    ]


def test_what_cannot_be_measured_is_refused(stream: tuple[Stream, Program]) -> None:
    _, program = stream
    with pytest.raises(
        InputError, match=r"score='size': choose one of magnitude, activation, taylor, random"
    ):
        Shrink(ffn=0.5, score="size")
    with pytest.raises(ResourceError, match="calibration"):
        bg.Pipeline([Shrink(ffn=0.4, score="taylor")]).run(program)
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    without = bg.capture(plain, {"input": torch.randn(3, 4)})
    with pytest.raises(
        PassError, match=r"score='taylor' reads the gradient of a loss, and the program has none"
    ):
        bg.Pipeline([Shrink(ffn=0.5, score="taylor")]).run(
            without, calibration=[{"input": torch.randn(3, 4)}]
        )
    with pytest.raises(
        PassError, match="activation measures, and a program on the meta device has no values"
    ):
        bg.Pipeline([Shrink(ffn=0.4, score="activation")]).run(program.to("meta"), calibration=BATCHES)
