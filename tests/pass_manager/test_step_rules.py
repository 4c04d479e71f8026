"""Passes of the step stage get the same chores as those of the model stage: contracts, drift, cost, observers, records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import fx

import bmgraph as bg
from bmgraph.backends import SGD, Torch
from bmgraph.errors import BmgraphError, DriftError, OrderError, PassError, ResourceError, VerificationError
from bmgraph.ir.program import output_node
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.observers import Dump, OperatorDiff, Timing
from bmgraph.pass_manager.pass_base import Effect, StepPass
from bmgraph.passes import ZeRO
from bmgraph.runtime.training.trainer import Trainer
from bmgraph.training.step_program import StepProgram
from tests.helpers.ranks import run_ranks

aten = torch.ops.aten
X = {"x": torch.linspace(-1, 1, 12).reshape(4, 3)}


class Small(torch.nn.Module):
    """Two linears and a mean loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(3, 5), torch.nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """x f[B, 3] -> loss f[]."""
        return {"loss": self.second(self.first(x).tanh()).square().mean()}


def train(*passes: bg.Pass, **options: Any) -> Trainer:
    return bg.compile(Small(), passes, example=X, backend=Torch(optimizer=SGD(lr=0.1)), **options)


def each_gradient(step: StepProgram, change: Callable[[fx.Node], fx.Node]) -> None:
    output = output_node(step.graph)
    loss, count, *gradients = step.returned()
    output.args = ((loss, count, *map(change, gradients)),)


@dataclass(frozen=True, repr=False)
class Scaled(StepPass):
    """Multiplies every gradient."""

    effect: ClassVar[Effect] = "approximate"
    default_drift: ClassVar[float] = 0.1
    provides: ClassVar[frozenset[str]] = frozenset({"scaled"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"scaled"})

    by: float = 1.0
    by_resource: str = ""

    @property
    def resources(self) -> tuple[str, ...]:
        return (self.by_resource,) if self.by_resource else ()

    def run(self, step: StepProgram, context: Context) -> StepProgram:
        by = float(context.resource(self.by_resource)) if self.by_resource else self.by
        each_gradient(
            step, lambda node: step.call(aten.mul.Tensor, node, by, before=output_node(step.graph), like=node)
        )
        for name in step.trained:
            context.edited(name, f"gradient times {by:g}")
        return step


@dataclass(frozen=True, repr=False)
class Intended(Scaled):
    """Means to change the gradients."""

    effect: ClassVar[Effect] = "intended"
    provides: ClassVar[frozenset[str]] = frozenset()
    conflicts: ClassVar[frozenset[str]] = frozenset()


@dataclass(frozen=True, repr=False)
class Outer(StepPass):
    """Runs another pass as a part of itself; it says to be exact."""

    by: float = 1.0

    def run(self, step: StepProgram, context: Context) -> StepProgram:
        step = context.run(Scaled(self.by), step)
        context.edited("", "scaled")
        return step


@dataclass(frozen=True, repr=False)
class Nothing(StepPass):
    """Finds no site."""

    def run(self, step: StepProgram, context: Context) -> StepProgram:
        context.declined("first", "it is small")
        return step


def test_an_approximate_pass_drifts_within_its_bound() -> None:
    trainer = train(Scaled(1.05))
    (record,) = trainer.report.records
    assert record.drift == pytest.approx(0.05, rel=1e-2)
    assert record.stage == "step"
    assert record.before is not None
    assert (record.before.parameters, record.before.bytes) == (32, 128)
    assert record.before.flops == record.after.flops > 0
    assert "largest relative L2 change of loss and 4 gradients on 4x3" in str(trainer.report)


@pytest.mark.parametrize(("by", "options"), [(1.2, {}), (1.05, {"max_drift": 0.01}), (float("nan"), {})])
def test_one_that_drifts_too_far_is_stopped(by: float, options: dict[str, float]) -> None:
    told = r"pass scaled.* was stopped: the loss and gradients drifted by .* by this pass, more than .*gradient of"
    with pytest.raises(DriftError, match=told):
        train(Scaled(by), **options)


def test_what_is_checked_follows_the_passes() -> None:
    first, exact = train(Intended(3.0), ZeRO(3)).report.records
    assert (first.compared, exact.compared) == ("taken anew", "loss and 4 gradients on 4x3")
    first, _ = train(Scaled(1.05), ZeRO(3)).report.records
    assert first.cumulative == first.drift
    with pytest.raises(VerificationError, match=r"pass outer.* 4 gradients changed"):
        train(Outer(1.05))
    inner, outer = train(Outer()).report.records
    assert (inner.text, inner.within, outer.text) == ("scaled", "outer", "outer")


def test_observers_see_steps(tmp_path: Any) -> None:
    timing, diff = Timing(), OperatorDiff()
    train(Scaled(1.05), observers=[timing, diff, Dump(tmp_path)])
    assert [name for name, _ in timing.seconds] == ["scaled{by=1.05}"]
    assert diff.changes == [("scaled{by=1.05}", {"aten.mul.Tensor": 4})]
    assert (tmp_path / "00-scaled.txt").read_text().startswith("step:\n")
    assert "+  %mul_2 = aten.mul" in (tmp_path / "00-scaled.diff").read_text()


def test_a_resource_is_read_and_recorded() -> None:
    (record,) = train(Scaled(by_resource="factor"), resources={"factor": 1.05}).report.records
    assert list(record.resources) == ["factor"]
    with pytest.raises(ResourceError, match="needs the resource 'factor'"):
        train(Scaled(by_resource="factor"))


@pytest.mark.parametrize(
    ("passes", "kind", "told"),
    [
        ((Nothing(),), PassError, r"pass nothing changed nothing \(first: it is small\)"),
        ((Scaled(), Scaled()), OrderError, "scaled cannot run on a program that is scaled"),
    ],
)
def test_contracts_hold(passes: tuple[StepPass, ...], kind: type[BmgraphError], told: str) -> None:
    with pytest.raises(kind, match=told):
        train(*passes)


def test_a_pipeline_ends_before_the_step_stage() -> None:
    with pytest.raises(
        OrderError, match="pass zero is of the step stage, and cannot run on a program: give all"
    ):
        bg.Pipeline([ZeRO(3)]).run(bg.capture(Small(), X))


def _on_ranks(rank: int) -> tuple[list[float | None], str]:
    records = train(ZeRO(3), Scaled(1.05)).report.records
    try:
        train(ZeRO(3), Scaled(1.2))
    except DriftError as error:
        return [record.drift for record in records], str(error)
    return [record.drift for record in records], "let through"


def test_shards_are_compared_whole() -> None:
    for (exact, approximate), told in run_ranks(2, _on_ranks):
        assert exact == pytest.approx(0, abs=1e-5)
        assert approximate == pytest.approx(0.05, rel=1e-2)
        assert "pass scaled{by=1.2} was stopped: the loss and gradients drifted by 0.2" in told
