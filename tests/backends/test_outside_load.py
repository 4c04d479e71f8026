"""An engine of another package's backend is loaded by its `load`, in trust of that package by name, and on other ranks."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.helpers.outside import MODEL, installed, run_python

KEPT = '''
"""Scales its input by weights that it keeps in a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from bmgraph.api import (
    Backend, Bundle, Engine, Program, Report, describe, read_description, read_tensors, write_bundle, write_tensors,
)


class KeptEngine(Engine):
    def __init__(self, weights, inputs, outputs, ranges, report):
        super().__init__(inputs, outputs, ranges, report)
        self.weights = weights

    def __call__(self, **batch):
        (value,) = self.checked(batch).values()
        linear = torch.nn.functional.linear
        hidden = linear(value, self.weights["0.weight"], self.weights["0.bias"]).relu()
        return {self.outputs[0].name: linear(hidden, self.weights["2.weight"], self.weights["2.bias"])}

    def save(self, path):
        write_bundle(Path(path), "engine", describe(self), {"w.safetensors": lambda f: write_tensors(f, self.weights)})


@dataclass(frozen=True)
class Kept(Backend[KeptEngine]):
    name: ClassVar[str] = "kept"

    def build(self, program: Program, report: Report, manager=None) -> KeptEngine:
        report.backend = self.name
        return KeptEngine(program.parameters, program.inputs, program.outputs, program.ranges, report)

    @classmethod
    def load(cls, bundle: Bundle) -> KeptEngine:
        found = read_description(bundle.path, bundle.manifest, 0)
        weights = read_tensors(bundle.open("w.safetensors"))
        return KeptEngine(weights, found.inputs, found.outputs, found.ranges, found.report)


@dataclass(frozen=True)
class Lost(Backend[KeptEngine]):
    """A backend that does not say how its engines are loaded."""

    name: ClassVar[str] = "lost"

    def build(self, program: Program, report: Report, manager=None) -> KeptEngine:
        return Kept().build(program, report)
'''

RANKS = """
import sys
import kept
import toy
import torch
import bmgraph as bg
from bmgraph.errors import BmgraphError
from tests.helpers.ranks import run_ranks

def work(rank):
    model, x = toy.model()
    engine = bg.compile(model, example=x, backend=kept.Kept())
    try:
        bg.compile(model, example=x, backend=kept.Lost())
        said = ""
    except BmgraphError as error:
        said = str(error)
    return type(engine).__name__, engine(**x)["output"], said

if __name__ == "__main__":
    (kind, one, _), (other, two, said) = run_ranks(2, work)
    print(kind, other, torch.equal(one, two), said)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    points = "[bmgraph.backends]\nkept = kept:Kept\n"
    return installed(folder, points, {"kept": KEPT, "toy": MODEL, "on_ranks": RANKS})


def _python(site: Path, code: str) -> subprocess.CompletedProcess[str]:
    return run_python(site, "-c", "import sys, torch, bmgraph as bg, toy\nmodel, x = toy.model()\n" + code)


def test_it_is_loaded_in_trust_of_its_package_alone(site: Path, tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    saved = _python(
        site,
        f"engine = bg.compile(model, example=x, backend='kept')\nengine.save({str(folder)!r})\n"
        f"found = bg.load({str(folder)!r}, trust=('Outside',))\n"
        "print(type(found).__name__, torch.equal(found(**x)['output'], engine(**x)['output']), found.report.backend)\n"
        "try:\n"
        f"    bg.load({str(folder)!r}, trust=('outside',), threads=1)\n"
        "except ValueError as error:\n"
        "    print(error)\n",
    )
    assert saved.stdout.splitlines() == [
        "KeptEngine True kept",
        "an engine of backend kept takes no threads",
    ], saved.stderr
    for trust in ("False", "True", "('other',)"):
        told = _python(
            site,
            f"try:\n    bg.load({str(folder)!r}, trust={trust})\nexcept ValueError as error:\n"
            "    print('kept' in sys.modules, error)\n",
        )
        assert told.stdout == (
            f"False {folder} holds an engine of backend 'kept', which code of another package loads: if you trust outside, "
            'load with bg.load(path, trust=("outside",))\n'
        ), told.stderr


@pytest.mark.slow
def test_without_its_package_it_is_refused(site: Path, tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    assert not _python(site, f"bg.compile(model, example=x, backend='kept').save({str(folder)!r})").returncode
    told = _python(
        site,
        "import importlib.metadata as m\n"
        "m.entry_points = lambda **chosen: m.EntryPoints()\n"
        f"try:\n    bg.load({str(folder)!r}, trust=('outside',))\nexcept ValueError as error:\n    print(error)\n",
    )
    assert "nor one of an installed package: install the package that adds it" in told.stdout, told.stderr


@pytest.mark.slow
def test_other_ranks_load_what_rank_0_saved(site: Path) -> None:
    done = run_python(site, "on_ranks.py")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("KeptEngine KeptEngine True ")
    assert "holds an engine of backend 'lost', which has no `load`" in done.stdout
    assert (
        "on several ranks, backend 'lost' must have a `load` for its engines, or set every_rank_lowers = True"
        in done.stdout
    )
