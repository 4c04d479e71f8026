"""Pass ordering: an invalid order is refused before anything runs, and the message gives a valid one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmgraph.errors import OrderError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.ordering import check_order
from bmgraph.pass_manager.pass_base import FINAL, FOR_ENGINES, ModelPass, Pass, StepPass
from bmgraph.training.step_program import StepProgram


@dataclass(frozen=True, repr=False)
class _Nothing(ModelPass):
    def run(self, program: Program, context: Context) -> Program:
        raise AssertionError("an order is checked before anything runs")


@dataclass(frozen=True, repr=False)
class _NoStep(StepPass):
    def run(self, step: StepProgram, context: Context) -> StepProgram:
        raise AssertionError("an order is checked before anything runs")


@dataclass(frozen=True, repr=False)
class Paint(_Nothing):
    provides: ClassVar[frozenset[str]] = frozenset({"painted"})


@dataclass(frozen=True, repr=False)
class Polish(_Nothing):
    requires: ClassVar[frozenset[str]] = frozenset({"painted"})


@dataclass(frozen=True, repr=False)
class Sand(_Nothing):
    conflicts: ClassVar[frozenset[str]] = frozenset({"painted"})


@dataclass(frozen=True, repr=False)
class Ship(_NoStep):
    pass


@dataclass(frozen=True, repr=False)
class Varnish(_Nothing):
    provides: ClassVar[frozenset[str]] = frozenset({FINAL})


@dataclass(frozen=True, repr=False)
class Crate(_Nothing):
    provides: ClassVar[frozenset[str]] = frozenset({FOR_ENGINES})


@dataclass(frozen=True, repr=False)
class Drill(_NoStep):
    provides: ClassVar[frozenset[str]] = frozenset({"drilled"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"drilled", FINAL})


def test_a_right_order_passes() -> None:
    check_order([Sand(), Paint(), Polish(), Ship()])
    check_order([Paint(), Varnish(), Ship()])


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([Polish(), Paint()], r"polish requires painted.*passes=\[paint, polish\]"),
        ([Paint(), Sand()], r"sand cannot run on a program that is painted.*passes=\[sand, paint\]"),
        ([Ship(), Paint()], r"paint is of the model stage and cannot follow ship.*passes=\[paint, ship\]"),
        ([Varnish(), Paint()], r"paint cannot run on a program that is final.*passes=\[paint, varnish\]"),
        ([Ship(), Polish(), Paint(), Sand()], r"passes=\[sand, paint, polish, ship\]"),
    ],
)
def test_an_invalid_order_is_refused_with_a_valid_one(passes: list[Pass], message: str) -> None:
    with pytest.raises(OrderError, match=message):
        check_order(passes)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(OrderError, match="put one of these before it: Paint"):
        check_order([Polish()], known=lambda: [Paint, Sand])
    check_order([Polish()], has=["painted"])


def test_passes_without_a_valid_order_are_reported() -> None:
    with pytest.raises(OrderError, match="no order of these passes is valid"):
        check_order([Sand()], has=["painted"])


def test_what_is_final_comes_after_the_training() -> None:
    told = r"train first, .*: passes=\[paint, drill\], then bg.compile\(trainer.program\(\), passes=\[varnish\]\)"
    for order in ([Paint(), Varnish(), Drill()], [Paint(), Drill(), Varnish()]):
        with pytest.raises(OrderError, match=told):
            check_order(order)
    with pytest.raises(OrderError, match="no order of these passes is valid"):
        check_order([Varnish(), Drill()], has=["drilled"])


@pytest.mark.parametrize("order", [[Crate(), Drill()], [Drill(), Crate()]])
def test_what_is_for_engines_comes_after_the_training(order: list[Pass]) -> None:
    with pytest.raises(
        OrderError,
        match=r"train first, try this order: passes=\[drill\], then bg.compile\(trainer.program\(\), passes=\[crate\]\)",
    ):
        check_order(order)
    check_order([Crate(), Paint()])


def test_orders_that_are_offered_hold_what_the_user_wrote() -> None:
    added, paint, sand = Varnish(), Paint(), Sand()
    with pytest.raises(OrderError, match=r"passes=\[sand, paint\]$"):
        check_order([paint, sand, added], added=[added])
    with pytest.raises(OrderError, match="cannot run on a program that is final; no order") as told:
        check_order([added, paint], added=[added])
    assert "varnish" not in str(told.value)


def test_the_stages_of_the_backend_hold() -> None:
    with pytest.raises(OrderError, match="step stage, which this backend does not have"):
        check_order([Ship()], stages=("model",))


@given(st.permutations([Paint(), Polish(), Sand(), Ship()]))
def test_every_order_is_valid_or_gets_a_valid_one(order: list[Pass]) -> None:
    if order == [Sand(), Paint(), Polish(), Ship()]:
        check_order(order)
        return
    with pytest.raises(OrderError, match=r"passes=\[sand, paint, polish, ship\]"):
        check_order(order)
