"""Wrong passes of the step stage that misplace gradients or optimizer state are stopped at default settings, and named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from bmgraph.errors import BmgraphError, VerificationError
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, StepPass
from bmgraph.passes import ZeRO
from bmgraph.training.placement import Place, Update
from bmgraph.training.step_program import StepProgram
from bmgraph.verify import update_check
from tests.helpers.ranks import run_ranks
from tests.pass_manager.test_step_plants import train

Fault = Callable[[StepProgram], None]


def _like(step: StepProgram) -> tuple[str, str]:
    """Two trained tensors of one shape."""
    one, other = (
        next(name for name in step.trained if stem in name) for stem in ("hidden.weight", "more.weight")
    )
    return one, other


def _states_swapped(step: StepProgram) -> None:
    one, other = _like(step)
    first, second = step.updates[one], step.updates[other]
    step.updates[one] = Update(first.gradient, second.state)
    step.updates[other] = Update(second.gradient, first.state)


def _gradients_swapped(step: StepProgram) -> None:
    one, other = _like(step)
    first, second = step.updates[one], step.updates[other]
    step.updates[one] = Update(second.gradient, first.state)
    step.updates[other] = Update(first.gradient, second.state)


def _state_in_half(step: StepProgram) -> None:
    one, _ = _like(step)
    found = step.updates[one]
    step.updates[one] = Update(found.gradient, replace(found.state, dtype=torch.bfloat16))


def _state_of_other_ranks(step: StepProgram) -> None:
    one, _ = _like(step)
    found = step.updates[one]
    state = Place.pack([(one, step.tensors[one])], 2)
    step.updates[one] = Update(found.gradient, state)


def _place_forgotten(step: StepProgram) -> None:
    del step.places[_like(step)[0]]


def _another_value(step: StepProgram) -> None:
    """A value that is not what its place says."""
    one, _ = _like(step)
    step.tensors[one] = step.tensors[one].reshape(-1)


FAULTS: dict[str, tuple[Fault, str]] = {
    "an optimizer state swapped": (
        _states_swapped,
        "'hidden.weight' would be updated with the optimizer state of 'more.weight'",
    ),
    "a gradient's place swapped": (
        _gradients_swapped,
        "'hidden.weight' would be updated with the gradient of 'more.weight'",
    ),
    "a state in half precision": (_state_in_half, "the update of 'hidden.weight' is not what it was"),
    "a state cut for other ranks": (
        _state_of_other_ranks,
        "the optimizer state of 'hidden.weight' lies otherwise than its value",
    ),
    "a place forgotten": (_place_forgotten, "the step has no place, or no tensor, for 'hidden.weight'"),
    "a value of another shape": (_another_value, r"the tensor 'hidden.weight' is torch.float32\[64\]"),
}
SHARED: dict[str, Fault] = {
    "an optimizer state swapped": _states_swapped,
    "a state in half precision": _state_in_half,
}


@dataclass(frozen=True, repr=False)
class Misplacing(StepPass):
    """Says that it changes nothing."""

    effect: ClassVar[Effect] = "exact"

    may_match_nothing: ClassVar[bool] = True

    fault: str = ""

    def run(self, step: StepProgram, context: Context) -> StepProgram:
        """Plant the fault."""
        FAULTS[self.fault][0](step)
        return step


@dataclass(frozen=True, repr=False)
class MisplacingZeRO(ZeRO):
    """ZeRO with a planted fault."""

    fault: str = ""

    def run(self, step: StepProgram, context: Context) -> StepProgram:
        """Share, then plant the fault."""
        step = super().run(step, context)
        if self.fault == "a reduction dropped on one rank":
            _no_reduction(step)
        elif self.fault:
            SHARED[self.fault](step)
        return step


def _no_reduction(step: StepProgram) -> None:
    """The gradients of one bucket are not summed on the last rank."""
    node = next(node for node in step.graph.nodes if "wait_tensor" in str(node.target))
    source: Any = node.args[0]
    assert "all_reduce" in str(source.target)
    if step.ranks.rank:
        node.replace_all_uses_with(source.args[0])
        step.graph.erase_node(node)
        step.graph.erase_node(source)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_stopped_on_one_rank(fault: str) -> None:
    with pytest.raises(VerificationError, match=rf"pass misplacing.*was stopped: {FAULTS[fault][1]}"):
        train(Misplacing(fault))


def test_of_a_large_tensor_some_rows_are_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: set[tuple[int, ...]] = set()
    numbers = update_check._numbers

    def seen(part: str, key: str, shape: Sequence[int]) -> torch.Tensor:
        shapes.add(tuple(shape))
        return numbers(part, key, shape)

    monkeypatch.setattr(update_check, "LARGEST", 8)
    monkeypatch.setattr(update_check, "_numbers", seen)
    with pytest.raises(VerificationError, match=r"the update of 'hidden.weight' is not what it was"):
        train(Misplacing("a state in half precision"))
    assert shapes == {(3, 8)}  # of 8 x 8


def _told(rank: int) -> dict[str, str]:
    found = {}
    for stage in (1, 2, 3):
        for fault in (*SHARED, *(("a reduction dropped on one rank",) if stage == 1 else ())):
            try:
                train(MisplacingZeRO(stage=stage, fault=fault))
                found[f"{stage}: {fault}"] = "let through"
            except BmgraphError as error:
                found[f"{stage}: {fault}"] = str(error)
    return found


@pytest.mark.slow
def test_faults_are_stopped_on_two_ranks() -> None:
    for told in run_ranks(2, _told):
        for fault, error in told.items():
            assert error.startswith("pass misplacingzero"), f"{fault}: {error}"
            assert "was stopped" in error, f"{fault}: {error}"
            if "state swapped" in fault:
                assert "the optimizer state of" in error
