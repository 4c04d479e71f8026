"""A rounding operator of another package (the one in docs/extending.md): one row and one translation are all that it needs."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from shutil import rmtree

import pytest

from bmgraph.errors import InputError
from bmgraph.ops.outside import find_outside, outside_operators
from bmgraph.ops.trait_row import UNKNOWN, Kind
from bmgraph.ops.traits import row_of
from tests.helpers.outside import installed, run_python
from tests.helpers.pages import code_of, entry_points_of

TOY = '''
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

import bmgraph as bg
import steps
from bmgraph.api import ModelPass, WeightsMoved, linears, weight_of


@dataclass(frozen=True, repr=False)
class Steps(ModelPass):
    """Round the input and the weight of each linear."""

    effect: ClassVar[str] = "approximate"
    default_drift: ClassVar[float] = 1.0
    step: float = 0.25

    @property
    def measured(self):
        return WeightsMoved(0.5)

    def run(self, program, context):
        with program.edit(by=str(self)) as editor:
            for node in linears(program.graph):
                site = weight_of(program, node).site
                for place, part in ((0, "activation"), (1, "weight")):
                    rounded = editor.call(
                        torch.ops.steps.round_to.default, node.args[place], self.step, like=node, site=site, part=part
                    )
                    node.update_arg(place, rounded)
                context.edited(site, "rounded to steps")
        return program


def captured():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 16, bias=False)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    return bg.capture(model, {"input": torch.randn(4, 16)})


def found(program):
    structure = program.structure()
    return [linear.name for linear in structure.linears], [site.down for site in structure.feedforwards]


def refusal(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "taken"
'''


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `pip install` leaves it: the module, and metadata that declares its entry point."""
    modules = {"steps": code_of("extending.md", "An operator"), "toy": TOY}
    folder = tmp_path_factory.mktemp("site")
    return installed(folder, entry_points_of("extending.md", "An operator"), modules, "round_steps")


def _lines(site: Path, code: str, *arguments: str) -> list[str]:
    done = run_python(site, "-c", code, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


SAVE = """
import sys, torch
from toy import *

program = captured()
rounded = bg.Pipeline([Steps()]).run(program)
print(found(program) == found(rounded), found(rounded))
print(refusal(bg.Pipeline([Steps(30.0)]).run, program))
rounded.save(sys.argv[1])
engine = bg.compile(rounded, backend="onnx")
batch = {"input": torch.randn(7, 16)}
print(torch.equal(engine(**batch)["output"], rounded(**batch)["output"]))
"""

LOAD = """
import sys, torch
import bmgraph as bg

try:
    bg.load(sys.argv[1])
except ValueError as error:
    print(f"{type(error).__name__}: {error}")
print("steps" in sys.modules)
program = bg.load(sys.argv[1], trust=("round-steps",))
print(str(program).count("steps.round_to"), "steps" in sys.modules)
"""


@pytest.fixture(scope="module")
def saved(site: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A program with the operator that was saved in another process, and what that process said."""
    out = tmp_path_factory.mktemp("saved") / "out"
    return out, _lines(site, SAVE, str(out))


def test_structure_sees_through_it_the_verifier_checks_it_and_onnx_runs_it(
    saved: tuple[Path, list[str]],
) -> None:
    kept, refused, equal = saved[1]
    assert kept == "True (['0.weight', '2.weight'], ['2.weight'])"
    assert refused.startswith("VerificationError: ")
    assert "0.weight" in refused
    assert equal == "True"


def test_a_program_with_it_is_loaded_in_trust_of_its_package_alone(
    site: Path, saved: tuple[Path, list[str]]
) -> None:
    refused, imported, loaded = _lines(site, LOAD, str(saved[0]))
    assert refused.startswith("BundleError: the program calls operators of round-steps, which is code of")
    assert "bg.load(path, trust=('round-steps',))" in refused
    assert imported == "False"
    assert loaded == "4 True"


@pytest.mark.slow
def test_the_command_line_asks_for_the_package(site: Path, saved: tuple[Path, list[str]]) -> None:
    refused = run_python(site, "-m", "bmgraph", "run", str(saved[0]))
    assert refused.returncode == 2
    assert "round-steps" in refused.stderr
    taken = run_python(site, "-m", "bmgraph", "run", str(saved[0]), "--trust", "round_steps")
    assert taken.returncode == 0, taken.stderr
    assert "output" in taken.stdout


ALONE = """
import sys
from toy import *

program = captured()
print(refusal(bg.Pipeline([Steps()]).run, program))
rounded = bg.Pipeline([Steps()]).run(program, verify="off")
print(found(rounded)[1])
print(refusal(rounded.save, sys.argv[1] + "_2"))
print(refusal(bg.compile, rounded, backend="onnx"))
print(refusal(bg.load, sys.argv[1], trust="round_steps"))
"""


def test_without_its_entry_point_nothing_is_assumed_of_it(
    site: Path, saved: tuple[Path, list[str]], tmp_path: Path
) -> None:
    for name in ("steps.py", "toy.py"):
        (tmp_path / name).write_text((site / name).read_text())
    unchecked, feedforwards, unsaved, untranslated, unloaded = _lines(tmp_path, ALONE, str(saved[0]))
    assert "the pass changed more than weights and roundings" in unchecked
    assert feedforwards == "[]"
    assert unsaved.startswith("BundleError: operator 'steps.round_to' cannot be saved: no installed package")
    assert untranslated.startswith("BackendError: operator steps.round_to.default in")
    assert "no installed package adds it" in untranslated
    assert unloaded.startswith("BundleError: the program calls operators of round-steps, but no installed")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("steps:round_to", "gives a CustomOpDef: expected bmgraph.api.Operator"),
        ("steps:OPERATOR", "such as torch.ops.other.round.default"),
        ("steps:MISSING", "cannot be loaded"),
    ],
)
def test_an_entry_point_that_gives_something_else_is_named(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, said: str
) -> None:
    installed(tmp_path, f"[bmgraph.operators]\nother = {value}\n", package="broken")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(site))
    with pytest.raises(InputError, match="entry point 'other' of package 'broken'") as raised:
        outside_operators("broken")
    assert said in str(raised.value)


def test_a_package_that_is_installed_later_is_known_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of two packages that declare the same, each is named where its declaration is wrong."""
    (tmp_path / "later.py").write_text(code_of("extending.md", "An operator").replace("steps", "later"))
    monkeypatch.syspath_prepend(str(tmp_path))
    target = import_module("later").OPERATOR.call
    assert row_of(target) is UNKNOWN
    for package, value in (("one", "later:to_onnx"), ("two", "later:to_onnx"), ("three", "later:OPERATOR")):
        installed(tmp_path, f"[bmgraph.operators]\nlater = {value}\n", package=package)
    for package in ("one", "two"):
        with pytest.raises(InputError, match=f"entry point 'later' of package '{package}' in group"):
            outside_operators(package)
    for package in ("one", "two"):
        rmtree(tmp_path / f"{package}-1.0.dist-info")
    assert row_of(target).kind is Kind.ROUNDING
    assert find_outside(target) == ("three", *outside_operators("three"))
    rmtree(tmp_path / "three-1.0.dist-info")
    assert row_of(target) is UNKNOWN
    assert not outside_operators("three")
