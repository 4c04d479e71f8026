"""A pass of the step stage from another package (the one in docs/extending.md): with a resource, an observer and checks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.outside import installed, run_python
from tests.helpers.pages import code_of, entry_points_of

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
    page, heading = "extending.md", "A pass of the step stage"
    modules = {"small_round": code_of(page, heading), "train": TRAIN}
    return installed(tmp_path_factory.mktemp("site"), entry_points_of(page, heading), modules)


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
