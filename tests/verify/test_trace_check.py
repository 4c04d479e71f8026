"""A traced step is compared with autograd before any pass: what is wrong is seen, and what is right is let through."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import SGD, Torch
from bmgraph.errors import VerificationError
from bmgraph.ir.program import output_node
from bmgraph.training import call_gradients
from bmgraph.training.joint_graph import trace_step
from bmgraph.training.loss_terms import Loss
from bmgraph.training.precision import DTYPES, Precision
from bmgraph.training.step_program import StepProgram
from bmgraph.verify.trace_check import check_trace
from tests.helpers.captured import NAMES, captured
from tests.training.test_joint_graph import Shared
from tests.training.test_weighted_terms import Tagger, batch

aten = torch.ops.aten


class Tower(nn.Module):
    """Dropout, a norm with statistics of the batch, a weight that no loss reads, and labels of which the first rows have none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.unread = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """x f[B, 6], labels i64[B] -> loss f[], logits f[B, 4]."""
        h = self.drop(torch.relu(self.norm(self.first(x))))
        logits = self.second(h)
        return {
            "loss": nn.functional.cross_entropy(logits, labels),
            "logits": logits,
            "other": self.unread(h),
        }


def rows(count: int = 20, ignored: int = 10) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    labels[:ignored] = -100
    return {"x": torch.randn(count, 6, generator=generator), "labels": labels}


def summed(
    outputs: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The squares of all logits, and how many rows there are."""
    return outputs["logits"].square().sum(), torch.ones_like(batch["labels"]).sum()


@pytest.fixture(scope="module")
def tower() -> bg.Program:
    return bg.capture(Tower(), rows())


@pytest.mark.parametrize(
    ("loss", "dtype"), [("loss", "fp32"), (summed, "fp32"), ("loss", "bf16"), (summed, "fp16")]
)
def test_right_traces_pass(tower: bg.Program, loss: str | Loss, dtype: str) -> None:
    step = trace_step(tower, loss, precision=Precision(DTYPES[dtype]))
    line = check_trace(step, tower, loss)
    sizes = "20x6" if loss == "loss" else "8x6"  # the beginning has no label
    assert line == f"trace: loss and 6 gradients equal autograd's, on {sizes}"


def test_terms_that_share_a_batch_pass() -> None:
    program = bg.capture(Tagger(), batch(0))
    step = trace_step(program, "loss", accumulate=2)
    assert step.counts is not None
    assert "equal autograd's" in check_trace(step, program, "loss")


def _returned(
    step: StepProgram, place: int, change: Callable[[StepProgram, torch.fx.Node], torch.fx.Node]
) -> None:
    output = output_node(step.graph)
    found = list(step.returned())
    found[place] = change(step, found[place])
    output.args = (tuple(found),)


def _twice(step: StepProgram, node: torch.fx.Node) -> torch.fx.Node:
    return step.call(aten.mul.Tensor, node, 2, before=output_node(step.graph))


def _nothing(step: StepProgram, node: torch.fx.Node) -> torch.fx.Node:
    return step.call(aten.zeros_like.default, node, before=output_node(step.graph))


FAULTS = {
    "loss": (0, _twice, "gives a summed loss of"),
    "count": (1, _twice, "gives a summed loss of"),
    "doubled": (
        2,
        _twice,
        "differs from autograd in 1 of 8 gradients, most in that of 'first.weight' (by 1 of",
    ),
    "lost": (5, _nothing, "differs from autograd in 1 of 8"),
    "buffer": (-1, _twice, "another value than the program"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_traces_are_refused(tower: bg.Program, fault: str) -> None:
    step = trace_step(tower, "loss")
    place, change, message = FAULTS[fault]
    _returned(step, place, change)
    with pytest.raises(VerificationError, match=message.replace("(", r"\(")):
        check_trace(step, tower, "loss")


def test_a_gradient_that_the_trace_does_not_reach_is_refused(tower: bg.Program) -> None:
    step = trace_step(tower, "loss", unreached=frozenset({"second.bias"}))
    with pytest.raises(VerificationError, match=r"most in that of .second\.bias."):
        check_trace(step, tower, "loss")


def test_compile_refuses_a_wrong_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """And says what was compared otherwise; with verify="structure" it compares nothing."""
    backend = Torch(optimizer=SGD(lr=0.1))
    trainer = bg.compile(Tower(), example=rows(), backend=backend)
    assert any("equal autograd's" in note for note in trainer.report.notes)
    model, x = Shared(), torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(call_gradients, "distinct", list)  # two gradients that meet are then one
    with pytest.raises(VerificationError, match=r"differs from autograd in \d of 7 gradients"):
        bg.compile(model, example=(x,), backend=Torch(optimizer=SGD(lr=0.1), loss="output"))
    bg.compile(model, example=(x,), backend=Torch(optimizer=SGD(lr=0.1), loss="output"), verify="structure")


def test_what_cannot_be_compared_is_told(tower: bg.Program) -> None:
    step = trace_step(tower, "loss")
    wrong = tower.clone()
    for labels, message in (
        (torch.full((20,), -100), "has no item"),
        (torch.full((20,), 9), "does not run on the example"),
    ):
        wrong.example = {**rows(), "labels": labels}
        assert message in check_trace(step, wrong, "loss")


class Shifted(nn.Module):
    """One number is added to all scores of a softmax: its gradient is zero, and in half precision what rounding leaves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head, self.shift = (
            nn.Embedding(50, 64),
            nn.Linear(64, 50),
            nn.Parameter(torch.ones(())),
        )

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """ids i64[B, S] -> loss f[]."""
        scores = torch.tanh(self.head(self.table(ids))) + self.shift
        return {"loss": nn.functional.cross_entropy(scores.flatten(0, 1), ids.flatten())}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_rounding_leaves_passes(dtype: str) -> None:
    program = bg.capture(Shifted(), {"ids": torch.arange(40).reshape(5, 8)})
    step = trace_step(program, "loss", precision=Precision(DTYPES[dtype]))
    assert "equal autograd's" in check_trace(step, program, "loss")


def of_all_outputs(
    outputs: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The squares of all floating-point outputs, as one item."""
    total = torch.stack(
        [value.float().square().sum() for value in outputs.values() if value.is_floating_point()]
    ).sum()
    return total, torch.ones_like(total)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_all_architectures(name: str, dtype: str) -> None:
    program = captured(name)[1]
    if program.training:
        pytest.skip(program.training)
    step = trace_step(program, of_all_outputs, precision=Precision(DTYPES[dtype]))
    line = check_trace(step, program, of_all_outputs)
    assert "equal autograd's" in line or "random numbers" in line
