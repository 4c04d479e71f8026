"""Interrupted saves: a killed process or a full disk leaves the complete old bundle or the complete new one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bmgraph as bg
from bmgraph.errors import BundleError
from bmgraph.serialize.bundle import read_bundle, write_bundle
from bmgraph.serialize.safetensors_io import read_tensors, write_tensors
from tests.helpers.bundles import toy
from tests.helpers.paths import ROOT

SAVER = """
import itertools, sys, torch
from pathlib import Path
from bmgraph.serialize.bundle import write_bundle
from bmgraph.serialize.safetensors_io import write_tensors
print("ready", flush=True)
for number in itertools.count(1):
    tensors = {"a": torch.full((20_000,), float(number)), "b": torch.full((20_000,), float(number))}
    write_bundle(Path(sys.argv[1]), "program", {"number": number}, {
        name: (lambda file, name=name: write_tensors(file, {name: tensors[name]})) for name in tensors
    })
"""

NO_ROOM = """
import resource, sys
from tests.helpers.bundles import toy
program = toy()
most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for pair in sys.argv[1:]:
    limit, path = pair.split(":", 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), most))
    try:
        program.save(path)
        told = ""
    except Exception as error:
        told = f"{type(error).__name__} {error}"
    print(told)
"""


def _run(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def _check_whole(path: Path) -> int:
    bundle = read_bundle(path)
    for name in ("a", "b"):
        assert read_tensors(bundle.open(name))[name].unique().tolist() == [bundle.manifest["number"]]
    return int(bundle.manifest["number"])


def _kill_while_saving(path: Path, times: int, seed: int) -> None:
    pick = random.Random(seed)
    numbers = []
    for _ in range(times):
        process = _run(SAVER, str(path))
        assert process.stdout is not None
        process.stdout.readline()
        while not path.exists():
            time.sleep(0.001)
        time.sleep(pick.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
        process.stdout.close()
        numbers.append(_check_whole(path))
    assert any(numbers)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot exchange two folders in one step")
def test_killed_while_saving(tmp_path: Path) -> None:
    _kill_while_saving(tmp_path / "bundle", 3, seed=0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot exchange two folders in one step")
def test_killed_while_saving_often(tmp_path: Path) -> None:
    _kill_while_saving(tmp_path / "bundle", 40, seed=1)


@pytest.mark.parametrize("stop", ["_exchange", "flush", "_sha256"])
def test_stopped_at_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str) -> None:
    """A failure at any step leaves the old bundle and no temporary files."""
    path = tmp_path / "bundle"
    write_bundle(path, "program", {}, {"a": lambda file: write_tensors(file, {"a": torch.zeros(3)})})

    def fail(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(f"bmgraph.serialize.bundle.{stop}", fail)
    with pytest.raises(BundleError, match="disk is full"):
        write_bundle(path, "program", {}, {"a": lambda file: write_tensors(file, {"a": torch.ones(3)})})
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["bundle"]
    assert read_tensors(read_bundle(path).open("a"))["a"].tolist() == [0, 0, 0]


def test_without_exchange_the_new_bundle_takes_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bmgraph.serialize.bundle._exchange", lambda *_: False)
    for value in (0.0, 1.0):
        write_bundle(
            tmp_path / "bundle",
            "program",
            {},
            {"a": lambda file, value=value: write_tensors(file, {"a": torch.tensor(value)})},  # type: ignore[misc]
        )
    assert os.listdir(tmp_path) == ["bundle"]
    assert read_tensors(read_bundle(tmp_path / "bundle").open("a"))["a"].item() == 1


LIMITS = (100, 1500, 4000)
"""Limits on file size, in bytes."""


@pytest.fixture(scope="module")
def no_room(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, str]]:
    """A folder with one bundle per limit, and the messages of a process that saved over each under its limit."""
    folder, program = tmp_path_factory.mktemp("room"), toy()
    for limit in LIMITS:
        program.save(str(folder / str(limit) / "bundle"))
    process = _run(NO_ROOM, *(f"{limit}:{folder / str(limit) / 'bundle'}" for limit in LIMITS))
    out, _ = process.communicate(timeout=120)
    return folder, dict(zip(LIMITS, out.splitlines(), strict=True))


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX")
@pytest.mark.parametrize("limit", LIMITS)
def test_no_room(no_room: tuple[Path, dict[int, str]], limit: int) -> None:
    """A limit on file size simulates a full disk: the write fails in the middle of some file."""
    folder, told = no_room[0] / str(limit), no_room[1]
    path, out = folder / "bundle", told[limit]
    if "BundleError" in out:
        assert "the disk is full" in out
        assert str(path) in out
    else:
        assert out == ""
        assert max(item.stat().st_size for item in path.iterdir()) <= limit
    assert os.listdir(folder) == ["bundle"]
    bg.load(path)
    assert limit > 1000 or "BundleError" in out
