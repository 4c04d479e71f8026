"""A pass of the step stage from another package, by its entry point alone: with a resource, an observer and checks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.outside import installed, run_python

ROUND = '''
"""Round: gradients as bfloat16 would send them, times a factor that is given."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from bmgraph.api import Context, Effect, StepPass, StepProgram, output_node


@dataclass(frozen=True, repr=False)
class Round(StepPass):
    effect: ClassVar[Effect] = "approximate"
    default_drift: ClassVar[float] = 0.01

    factor: str = "factor"

    @property
    def resources(self) -> tuple[str, ...]:
        return (self.factor,)

    def run(self, step: StepProgram, context: Context) -> StepProgram:
        by, end = float(context.resource(self.factor)), output_node(step.graph)
        loss, count, *gradients = step.returned()
        aten = torch.ops.aten
        for index, node in enumerate(gradients):
            small = step.call(aten._to_copy.default, node, dtype=torch.bfloat16, before=end, like=node)
            again = step.call(aten._to_copy.default, small, dtype=torch.float32, before=end, like=node)
            gradients[index] = step.call(aten.mul.Tensor, again, by, before=end, like=node)
            context.edited(step.trained[index], "rounded to bfloat16")
        end.args = ((loss, count, *gradients),)
        return step
'''

TRAIN = """
import torch, bmgraph as bg
from bmgraph.backends import SGD, Torch
from bmgraph.errors import DriftError
from bmgraph.pass_manager.pass_spec import parse_passes
from bmgraph.passes import known_passes

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, x):
        return {"loss": self.linear(x).square().mean()}

class Watch:
    def after(self, item, before, program, record, seconds):
        added = len(program.graph.nodes) - len(before.graph.nodes)
        print("seen", item, added, record.drift > 0, sorted(record.resources), len(record.edits))

def train(factor):
    return bg.compile(
        Model(), parse_passes("round", known_passes()), example={"x": torch.randn(4, 3)}, observers=[Watch()],
        backend=Torch(optimizer=SGD(lr=0.1)), resources={"factor": factor},
    )

print([record.text for record in train(1.0).report.records])
try:
    train(1.5)
except DriftError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    points = "[bmgraph.passes]\nround = small_round:Round\n"
    return installed(tmp_path_factory.mktemp("site"), points, {"small_round": ROUND, "train": TRAIN})


def test_it_gets_the_chores_of_every_pass(site: Path) -> None:
    done = run_python(site, "train.py")
    lines = done.stdout.splitlines()
    assert lines[:2] == ["seen round 6 True ['factor'] 2", "['round']"], done.stderr
    assert "pass round was stopped: the loss and gradients drifted by 0.5" in lines[2]
    assert "more than 0.01" in lines[2]


def test_it_is_listed_with_its_stage(site: Path) -> None:
    listed = run_python(site, "-m", "bmgraph", "passes").stdout
    row = next(line for line in listed.splitlines() if "round" in line and "step" in line)
    assert "approximate" in row
