"""Saves leave whole files with the user's permissions, and nothing that nobody cleans."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import bmgraph as bg
from bmgraph.errors import BundleError
from bmgraph.serialize.bundle import write_bundle
from bmgraph.serialize.safetensors_io import read_tensors, write_tensors
from tests.helpers.bundles import toy
from tests.helpers.paths import ROOT

posix = pytest.mark.skipif(sys.platform == "win32", reason="permissions, pipes and locks are POSIX")

STUCK = """
import os, signal, sys
from pathlib import Path
from bmgraph.serialize.bundle import write_bundle
def stop(file):
    file.write_bytes(b"half")
    print("ready", flush=True)
    signal.pause()
write_bundle(Path(sys.argv[1]), "program", {}, {"a": stop})
"""


def _save(path: Path) -> None:
    write_bundle(path, "program", {}, {"a": lambda file: write_tensors(file, {"a": torch.zeros(3)})})


@posix
def test_the_next_save_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    process.stdout.readline()
    (tmp_path / ".bundle-mine").mkdir()
    _save(path)
    assert len(os.listdir(tmp_path)) == 3, "the folder of a living saver was removed"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    process.stdout.close()
    _save(path)
    assert sorted(os.listdir(tmp_path)) == [".bundle-mine", "bundle"]


@posix
@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_files_have_the_permissions_that_the_umask_gives(
    tmp_path: Path, mask: int, file_mode: int, folder_mode: int
) -> None:
    before = os.umask(mask)
    try:
        toy().save(tmp_path / "program")
        write_tensors(tmp_path / "alone", {"a": torch.zeros(3)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "program").stat().st_mode) == folder_mode
    for file in (*(tmp_path / "program").iterdir(), tmp_path / "alone"):
        assert stat.S_IMODE(file.stat().st_mode) == file_mode, file.name
    bg.load(tmp_path / "program")


@posix
def test_tensors_replace_regular_files_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/null"), tmp_path):
        with pytest.raises(BundleError, match="it is not a regular file"):
            write_tensors(place, {"a": torch.zeros(3)})
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_tensors(tmp_path / "link", {"a": torch.ones(3)})
    assert (tmp_path / "link").is_symlink()
    assert read_tensors(tmp_path / "real")["a"].tolist() == [1, 1, 1]
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe", "real"]


def test_other_readers_read_our_tensors(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(3, dtype=torch.int8), "a": torch.arange(4.0), "e": torch.zeros(0, 3), "s": torch.tensor(2.0),
        "t": torch.arange(6.0).reshape(2, 3).t(), "h": torch.ones(3, dtype=torch.bfloat16), "q": torch.tensor([True]),
    }  # fmt: skip
    write_tensors(tmp_path / "a", tensors)
    for found in (load_file(tmp_path / "a"), read_tensors(tmp_path / "a")):
        assert set(found) == set(tensors)
        for name, value in tensors.items():
            assert torch.equal(found[name], value)
            assert found[name].dtype is value.dtype
