"""Folders of unsaved engines: deleted if a build fails; those that killed processes left go with the next build."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends.onnx import backend
from bmgraph.errors import BackendError
from bmgraph.runtime.temporary import PREFIX, folder_for_engine
from tests.helpers.paths import ROOT

posix = pytest.mark.skipif(os.name != "posix", reason="this system does not lock folders")

STUCK = """
import signal
from bmgraph.runtime.temporary import folder_for_engine
with folder_for_engine() as folder:
    (folder.path / "model.onnx").write_bytes(b"half")
    print("ready", flush=True)
    signal.pause()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for temporary files, of this process and of those that it starts."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield tmp_path
    tempfile.tempdir = None


def test_a_build_that_fails_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> None:
        raise BackendError("refused")

    monkeypatch.setattr(backend, "write_model", refuse)
    with pytest.raises(BackendError, match="refused"):
        bg.compile(nn.Linear(2, 2), example=(torch.ones(3, 2),), backend="onnx")
    assert not [name for name in os.listdir(place) if name.startswith("bmgraph")]


@posix
def test_the_next_build_removes_what_a_killed_process_left(place: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    process.stdout.readline()
    left = set(os.listdir(place))
    others = {f"{PREFIX}mine", "bmgraph-abcdefgh"}
    for name in others:
        (place / name).mkdir()
    (place / f"{PREFIX}abcdefgh").symlink_to(place / "bmgraph-abcdefgh")
    others.add(f"{PREFIX}abcdefgh")
    with folder_for_engine() as made:
        assert set(os.listdir(place)) == left | others | {made.path.name}, "a living process lost its folder"
        made.delete()
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    process.stdout.close()
    with folder_for_engine() as made:
        assert set(os.listdir(place)) == others | {made.path.name}
        made.delete()
