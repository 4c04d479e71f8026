"""A program shares its weights with the model: a model that changes them in place makes it unusable, with one error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import InputError
from bmgraph.passes import LoRA

X = torch.randn(3, 32)
CHANGED = r"of the model were changed in place after the program was captured.*capture the model again"


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32))


def _optimizer_step(made: nn.Sequential) -> None:
    made(X).square().sum().backward()
    torch.optim.SGD(made.parameters(), lr=1e-6).step()


def _one_element(made: nn.Sequential) -> None:
    with torch.no_grad():
        made[0].weight[17, 3] += 1


def _by_data(made: nn.Sequential) -> None:
    made[3].weight.data.mul_(1.5)


def _load(made: nn.Sequential) -> None:
    made.load_state_dict({name: value + 1 for name, value in made.state_dict().items()})


@pytest.mark.parametrize("change", [_optimizer_step, _one_element, _by_data, _load])
def test_what_uses_the_program_refuses_it(change: Callable[[nn.Sequential], None], tmp_path: Path) -> None:
    made = model()
    program = bg.capture(made, (X,))
    small = bg.Pipeline([LoRA(targets=("*",), r=2)]).run(program)
    change(made)
    with pytest.raises(InputError, match=CHANGED):
        bg.compile(program, backend="onnx")
    with pytest.raises(InputError, match=CHANGED):
        bg.Pipeline([]).run(small)
    with pytest.raises(InputError, match=CHANGED):
        program.save(str(tmp_path / "program"))
    assert not (tmp_path / "program").exists()
    bg.capture(made, (X,)).save(str(tmp_path / "again"))


def test_what_does_not_share_is_kept(tmp_path: Path) -> None:
    """A copied model, a saved program, and weights that a pass has replaced."""
    made = model()
    program, of_copy = (bg.capture(item, (X,)) for item in (made, copy.deepcopy(made)))
    program.save(str(tmp_path / "program"))

    before = program(input=X)["output"]
    _by_data(made)
    assert torch.equal(of_copy(input=X)["output"], before)
    assert torch.equal(bg.load(tmp_path / "program")(input=X)["output"], before)
    bg.Pipeline([]).run(of_copy)


def test_runs_and_moves_of_the_model_are_no_changes() -> None:
    """A run in training mode moves the model's statistics, not the program's; a cast gives the model new storage."""
    made = model()
    program = bg.capture(made, (X,))
    before = program(input=X)["output"]
    made.train()(X * 7)
    made.requires_grad_(False)
    made.to(torch.float64)
    with torch.no_grad():
        made[0].weight.mul_(2)
    assert torch.equal(bg.Pipeline([]).run(program)(input=X)["output"], before)
