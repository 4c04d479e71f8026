"""A backend from another package (the one in docs/extending.md): taken by its name, checked, on the command line."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import bmgraph as bg
from bmgraph.backends import Onnx, resolve_backend
from bmgraph.backends.backend_base import Backend
from bmgraph.errors import InputError
from tests.helpers.outside import MODEL, installed, run_python
from tests.helpers.pages import code_of, entry_points_of


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    points = entry_points_of("extending.md", "A backend") + "wrong = toy:model\n"
    return installed(folder, points, {"small_backend": code_of("extending.md", "A backend"), "toy": MODEL})


def _python(site: Path, code: str) -> subprocess.CompletedProcess[str]:
    return run_python(site, "-c", "import torch, bmgraph as bg, toy\nmodel, x = toy.model()\n" + code)


def test_its_engine_is_built_by_name_checked_and_timed(site: Path) -> None:
    code = (
        "engine = bg.compile(model, example=x, backend='toy')\n"
        "print(type(engine).__name__, engine.report.backend, engine.report.engine_drift, engine.report.total_drift)\n"
        "print(torch.equal(engine(**x)['output'], bg.capture(model, x)(**x)['output']))\n"
        "print(bg.benchmark({'toy': engine}, x, runs=1, pause=0).base)\n"
    )
    told = _python(site, code)
    assert told.stdout.splitlines() == ["ToyEngine toy 0.0 0.0", "True", "toy"], told.stderr


@pytest.mark.slow
def test_a_wrong_engine_is_stopped(site: Path) -> None:
    code = "from small_backend import Toy\nbg.compile(model, example=x, backend=Toy(times=1.1))"
    assert (
        "VerificationError: the toy engine differs from its program in output by 1.0e-01"
        in _python(site, code).stderr
    )


@pytest.mark.slow
def test_it_is_named_on_the_command_line(site: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    done = run_python(
        site, "-m", "bmgraph", "compile", "toy:model", "--backend", "toy", "--passes", "quantize{activations=none}",
        "--out", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "toy engine, drift from the program 0.0000" in done.stdout
    assert isinstance(bg.load(out), bg.Program)
    refused = run_python(site, "-m", "bmgraph", "compile", "toy:model", "--backend", "toi", "--out", str(out))
    assert (
        "no backend is called 'toi': choose one of auto, onnx, openvino, tensorrt, torch, toy, wrong"
        in refused.stderr
    )


def test_what_is_no_backend_is_refused(site: Path) -> None:
    wrong = _python(site, "bg.compile(model, example=x, backend='wrong')").stderr
    assert (
        "entry point 'wrong' of bmgraph.backends is toy:model, which is not a backend of that name" in wrong
    )
    with pytest.raises(InputError, match=r"is neither a name .* nor a backend's configuration"):
        bg.compile(torch.nn.Linear(2, 2), example=(torch.ones(1, 2),), backend=Onnx)  # type: ignore[call-overload]


def test_a_backend_takes_what_it_says_it_takes() -> None:
    class Silent(Backend[Any]):
        name = "silent"

        def build(self, program: Any, report: Any, manager: Any = None) -> Any:
            raise NotImplementedError

    with pytest.raises(InputError, match="engines of backend 'silent' do not generate"):
        Silent().generating()
    for name in ("torch", "tensorrt"):
        assert resolve_backend(name).generating().generate
