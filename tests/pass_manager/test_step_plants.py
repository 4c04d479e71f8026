"""Wrong passes of the step stage are stopped at default settings, on one rank and on two, and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import fx

import bmgraph as bg
from bmgraph.backends import SGD, Torch
from bmgraph.errors import BmgraphError, VerificationError
from bmgraph.ir.program import output_node
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, StepPass
from bmgraph.passes import ZeRO
from bmgraph.training.step_program import StepProgram
from tests.helpers.attacks.ranks import Tagger, rows
from tests.helpers.ranks import run_ranks

aten = torch.ops.aten
Fault = Callable[[StepProgram], None]


def _returned(step: StepProgram, index: int, how: Callable[[StepProgram, fx.Node], fx.Node]) -> None:
    output = output_node(step.graph)
    values = list(step.returned())
    values[index] = how(step, values[index])
    output.args = (tuple(values),)


def _times(factor: float) -> Callable[[StepProgram, fx.Node], fx.Node]:
    return lambda step, node: step.call(aten.mul.Tensor, node, factor, before=output_node(step.graph))


def _another(step: StepProgram) -> None:
    """Two gradients of one shape change places."""
    values = list(step.returned())
    shapes: dict[tuple[int, ...], int] = {}
    for index, node in enumerate(values[2:], 2):
        shape = tuple(node.meta["val"].shape)
        if shape in shapes:
            other = shapes[shape]
            values[index], values[other] = values[other], values[index]
            break
        shapes[shape] = index
    output_node(step.graph).args = (tuple(values),)


def _wrong_tensor(step: StepProgram) -> None:
    """A trained tensor is another one of its shape."""
    name = step.trained[0]
    step.tensors[name] = step.tensors[name].flip(0)


def _nodes(step: StepProgram, name: str) -> list[fx.Node]:
    return [node for node in step.graph.nodes if name in str(node.target)]


def _no_reduction(step: StepProgram) -> None:
    for node in _nodes(step, "wait_tensor"):
        source: Any = node.args[0]
        if "reduce_scatter" in str(source.target):
            whole = source.args[0]
            share = int(node.meta["val"].shape[0])
            start = share * step.ranks.rank
            node.replace_all_uses_with(
                step.call(aten.slice.Tensor, whole, 0, start, start + share, before=node.next)
            )
            step.graph.erase_node(node)
            step.graph.erase_node(source)
            return


def _no_reduction_on_one(step: StepProgram) -> None:
    if step.ranks.rank:
        _no_reduction(step)


def _wrong_part(step: StepProgram) -> None:
    """A parameter is read from another place of its bucket: the rows of an embedding, moved by one."""
    view = next(node for node in _nodes(step, "view") if list(node.args[1]) == [20, 8])  # type: ignore[arg-type]
    with step.graph.inserting_after(view):
        moved = step.graph.call_function(aten.roll.default, (view, [1], [0]))
    moved.meta = dict(view.meta)
    view.replace_all_uses_with(moved, delete_user_cb=lambda user: user is not moved)


def _loss_of_one(step: StepProgram) -> None:
    """The loss is not summed over ranks."""
    both = _nodes(step, "stack")[-1]
    (source,) = both.users
    assert "all_reduce" in str(source.target)
    (wait,) = source.users
    wait.replace_all_uses_with(both)
    step.graph.erase_node(wait)
    step.graph.erase_node(source)


FAULTS: dict[str, Fault] = {
    "a gradient times -3": lambda step: _returned(step, 2, _times(-3)),
    "a gradient 1% too large": lambda step: _returned(step, 3, _times(1.01)),
    "another parameter's gradient": _another,
    "a loss halved": lambda step: _returned(step, 0, _times(0.5)),
    "a count doubled": lambda step: _returned(step, 1, _times(2)),
    "a tensor that is not what it was": _wrong_tensor,
}
SHARED: dict[str, Fault] = {
    "a gradient times -3": lambda step: _returned(step, 2, _times(-3)),
    "a reduction dropped": _no_reduction,
    "a reduction dropped on one rank": _no_reduction_on_one,
    "a parameter from another place": _wrong_part,
    "a loss that is not summed": _loss_of_one,
}
NONE: Fault = lambda step: None  # noqa: E731


@dataclass(frozen=True, repr=False)
class Faulty(StepPass):
    """Says that it changes nothing."""

    effect: ClassVar[Effect] = "exact"
    may_match_nothing: ClassVar[bool] = True

    fault: str = ""

    def run(self, step: StepProgram, context: Context) -> StepProgram:
        """Plant the fault."""
        FAULTS.get(self.fault, NONE)(step)
        return step


@dataclass(frozen=True, repr=False)
class FaultyZeRO(ZeRO):
    """ZeRO with a planted fault."""

    fault: str = ""

    def run(self, step: StepProgram, context: Context) -> StepProgram:
        """Shard, then plant the fault."""
        step = super().run(step, context)
        SHARED.get(self.fault, NONE)(step)
        return step


def train(item: StepPass) -> Any:
    torch.manual_seed(0)
    return bg.compile(Tagger(), passes=[item], example=rows(seed=0), backend=Torch(optimizer=SGD(lr=0.1)))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_stopped_on_one_rank(fault: str) -> None:
    with pytest.raises(VerificationError, match=r"pass faulty.*was stopped"):
        train(Faulty(fault))


def test_an_honest_pass_is_compared() -> None:
    record = train(Faulty()).report.records[-1]
    assert record.compared == "loss and 7 gradients on 6x5"


def _told(rank: int) -> dict[str, str]:
    found = {}
    for fault in ("", *SHARED):
        try:
            trainer = train(FaultyZeRO(fault=fault))
            found[fault] = "" if trainer.step(rows()).loss > 0 else "no loss"
        except BmgraphError as error:
            found[fault] = str(error)
    return found


@pytest.mark.slow
def test_faults_are_stopped_on_two_ranks() -> None:
    for told in run_ranks(2, _told):
        assert told.pop("") == ""
        for fault, error in told.items():
            assert "pass faultyzero" in error, f"{fault}: {error or 'let through'}"
            assert "was stopped" in error
