"""What the pass manager does around a pass: observers, drift limits, refusals, and a history that can be replayed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import bmgraph as bg
from bmgraph.errors import DriftError, InputError, MisplacedError, OrderError, PassError, ResourceError
from bmgraph.ir.pass_record import Record
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.observers import Dump, OperatorDiff, Timing
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.passes import MoEfy, Quantize, Shrink
from tests.helpers.feedforwards import calibration, captured_feedforward
from tests.helpers.models import TinyEncoder, tokens


@dataclass(frozen=True, repr=False)
class Idle(ModelPass):
    """Does nothing, and declines."""

    def run(self, program: Program, context: Context) -> Program:
        context.declined("everything", "it is idle")
        return program


@dataclass(frozen=True, repr=False)
class Double(ModelPass):
    """Changes the outputs on purpose."""

    effect: ClassVar[Effect] = "intended"

    def run(self, program: Program, context: Context) -> Program:
        program.parameters["head.weight"] = program.parameters["head.weight"] * 2
        context.edited("head", "doubled")
        return program


@dataclass(frozen=True, repr=False)
class Fitted(ModelPass):
    """Applies only to weights of one size."""

    size: float = 0.0
    within: bool = False

    def fits(self, program: Program, context: Context) -> bool:
        return float(program.parameters["head.weight"].abs().sum()) == self.size

    def run(self, program: Program, context: Context) -> Program:
        found = float(program.parameters["head.weight"].abs().sum())
        if self.within:
            program = context.run(Fitted(self.size), program)
        elif found != self.size:
            raise MisplacedError(f"made for a head of {self.size}, not of {found}")
        context.edited("head", "fits")
        return program


def test_a_misplaced_pass_that_fits_the_given_program_is_offered_as_the_first(program: Program) -> None:
    item = Fitted(float(program.parameters["head.weight"].abs().sum()))
    with pytest.raises(OrderError, match=r"pass fitted.*made for a head of .*: passes=\[fitted.*, double\]"):
        bg.Pipeline([Double(), item]).run(program)
    bg.Pipeline([item, Double()]).run(program)
    outer = Fitted(item.size, within=True)
    with pytest.raises(OrderError, match=r"passes=\[fitted\{.*within=true\}, double\]"):
        bg.Pipeline([Double(), outer]).run(program)
    with pytest.raises(PassError, match=r"not of \d+\.\d+$"):
        bg.Pipeline([Double(), Fitted(1.0)]).run(program)


@dataclass(frozen=True, repr=False)
class Counted(ModelPass):
    """Refuses every program, and counts how often it was run."""

    runs: ClassVar[list[str]] = []

    def fits(self, program: Program, context: Context) -> bool:
        return not program.history

    def run(self, program: Program, context: Context) -> Program:
        self.runs.append(str(self))
        raise MisplacedError("made for another model")


def test_a_refused_pass_is_not_run_again_to_word_its_error(program: Program) -> None:
    with pytest.raises(
        OrderError, match=r"made for another model; try this order: passes=\[counted, double\]"
    ):
        bg.Pipeline([Double(), Counted()]).run(program)
    assert Counted.runs == ["counted"]


def test_a_pass_that_finds_nothing_any_more_is_offered_as_the_first() -> None:
    program = captured_feedforward()
    with pytest.raises(OrderError, match=r"shrink.* changed nothing.*: passes=\[shrink.*, moefy"):
        bg.Pipeline([MoEfy(8, 4), Shrink(ffn=0.25)]).run(program, calibration=calibration())


def test_observers_see_every_pass(program: Program, tmp_path: Path) -> None:
    timing, diff = Timing(), OperatorDiff()
    item = Quantize("int8", activations="dynamic")
    bg.Pipeline([item], [timing, diff, Dump(tmp_path)]).run(program)
    assert [name for name, _ in timing.seconds] == [str(item)]
    assert diff.changes[0][1] == {"bmgraph.dequantize": 13, "bmgraph.quantize_dynamic": 9}
    assert (tmp_path / "00-quantize.txt").read_text().startswith("forward(ids")
    assert "+  %dequantize = " in (tmp_path / "00-quantize.diff").read_text()


def test_drift_is_bounded(program: Program) -> None:
    with pytest.raises(DriftError, match=r"pass quantize.* drifted by 0\.\d+ by this pass, more than 1e-05"):
        bg.Pipeline([Quantize("int8", activations="dynamic")]).run(program, max_drift=1e-5)
    done = bg.Pipeline([Quantize("int8", activations="dynamic")]).run(
        program, max_drift=1e-5, verify="structure"
    )
    assert done.history[-1].compared == "not compared"


def test_an_intended_change_starts_a_new_reference(program: Program) -> None:
    done = bg.Pipeline([Double(), Quantize("int8", activations="dynamic")]).run(program)
    assert done.history[0].compared == "taken anew"
    assert done.history[1].cumulative is not None
    assert done.history[1].cumulative < 0.1


def test_a_pass_that_does_nothing_is_an_error(program: Program) -> None:
    with pytest.raises(PassError, match="pass idle changed nothing \\(everything: it is idle\\)"):
        bg.Pipeline([Idle()]).run(program)


def test_an_invalid_pass_or_verify_level_is_refused(program: Program) -> None:
    with pytest.raises(OrderError, match="'quantize' is not a pass"):
        bg.Pipeline(["quantize"]).run(program)  # type: ignore[list-item]
    with pytest.raises(OrderError, match="'quantize' is not a pass"):
        bg.compile(program, ["quantize"])  # type: ignore[list-item]
    with pytest.raises(InputError, match="verify='much'"):
        bg.Pipeline([]).run(program, verify="much")  # type: ignore[arg-type]


def test_a_calibration_batch_that_does_not_fit_is_refused(program: Program) -> None:
    with pytest.raises(
        ResourceError, match="calibration batch 1 does not fit the program: missing input 'ids'"
    ):
        bg.Pipeline([Quantize("int8")]).run(
            program, calibration=[tokens(), {"attention_mask": torch.ones(2, 3)}]
        )


def test_records_go_through_json(program: Program, batches: list[dict[str, torch.Tensor]]) -> None:
    for record in bg.Pipeline([Quantize("int8")]).run(program, calibration=batches).history:
        assert Record.from_json(json.loads(json.dumps(record.as_json()))) == record


def test_a_history_is_replayed_to_equal_weights(
    program: Program, model: TinyEncoder, batches: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    done = bg.Pipeline([Quantize("int8")]).run(program, calibration=batches)
    done.save(str(tmp_path / "prog"))
    again = bg.replay(tmp_path / "prog", model, calibration=batches)
    assert list(again.parameters) == list(done.parameters)
    assert all(torch.equal(again.parameters[name], done.parameters[name]) for name in done.parameters)
    with pytest.raises(ResourceError, match="not the one"):
        bg.replay(tmp_path / "prog", model, calibration=batches[:2])
