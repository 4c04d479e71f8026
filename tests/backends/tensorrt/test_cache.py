"""What TensorRT keeps in a folder: times of kernels, and kernels that were compiled at calls."""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import TensorRT
from bmgraph.backends.tensorrt import network
from bmgraph.backends.tensorrt.network import use_times
from bmgraph.errors import InputError
from bmgraph.ir.program import Program
from bmgraph.runtime.tensorrt.cache_file import KERNELS, TIMING, CacheFile
from bmgraph.runtime.tensorrt.kernel_cache import KernelCache

if not (find_spec("tensorrt") or find_spec("tensorrt_rtx")):
    pytest.skip("neither tensorrt nor tensorrt-rtx is installed", allow_module_level=True)


def file(folder: Path, owner: str = "tensorrt 1 on 8.9") -> CacheFile:
    return CacheFile(folder, TIMING, owner)


def test_contents_come_back_for_their_owner_alone(tmp_path: Path) -> None:
    assert file(tmp_path).read() == b""
    file(tmp_path).write(b"times")
    assert file(tmp_path).read() == b"times"
    assert file(tmp_path, "tensorrt 2 on 8.9").read() == b""
    assert CacheFile(tmp_path, KERNELS, "tensorrt 1 on 8.9").read() == b""


@pytest.mark.parametrize("damage", ["cut", "foreign", "flipped", "empty", "renamed"])
def test_a_file_that_is_not_whole_is_not_used_and_then_replaced(tmp_path: Path, damage: str) -> None:
    made = file(tmp_path)
    made.write(b"times of kernels")
    data = made.path.read_bytes()
    other = CacheFile(tmp_path, KERNELS, "another")
    other.write(b"x")
    damaged = {
        "cut": data[:-3], "foreign": b"MZ" + data, "flipped": data[:-1] + b"\0", "empty": b"", "renamed": other.path.read_bytes()
    }[damage]  # fmt: skip
    made.path.write_bytes(damaged)
    again = file(tmp_path)
    assert again.read() == b""
    assert "is not used: it is not what was written there" in again.note
    again.write(b"new")
    assert file(tmp_path).read() == b"new"


def test_a_file_that_cannot_be_written_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    made = file(tmp_path)
    made.path.mkdir()
    made.write(b"times")
    assert "could not be written" in made.note
    assert made.read() == b""
    assert os.listdir(tmp_path) == [made.path.name]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    program = bg.capture(nn.Linear(4, 4), {"input": torch.randn(2, 4)})
    with pytest.raises(InputError, match=r"cache=.*file' is no folder that can be made"):
        bg.compile(program, backend=TensorRT(cache=str(tmp_path / "file")))


class Config:
    """A builder's configuration, which takes only times that begin with `of`."""

    def __init__(self, of: bytes) -> None:
        self.of, self.taken = of, b"none"

    def create_timing_cache(self, data: bytes) -> bytes | None:
        return data if not data or data.startswith(self.of) else None

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.taken = cache
        return True


def test_times_that_tensorrt_refuses_are_left_out(tmp_path: Path) -> None:
    file(tmp_path).write(b"8.9 times")
    for of, taken, note in ((b"8.9", b"8.9 times", ""), (b"9.0", b"", "TensorRT refuses it")):
        config, times = Config(of), file(tmp_path)
        use_times(config, times)
        assert config.taken == taken
        assert note in times.note


def test_a_build_keeps_times_where_the_library_measures_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = bg.capture(nn.Linear(4, 4), {"input": torch.randn(2, 4)})
    monkeypatch.setattr(network, "compiles_at_calls", lambda trt: False)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # the library that builds without a GPU does not need them
        for _ in range(2):
            bg.compile(program, backend=TensorRT(cache=str(tmp_path)))
    (made,) = os.listdir(tmp_path)
    assert made.startswith("timing-")


class Engine:
    """A loaded plan, and its configuration and its cache."""

    def __init__(self, of: bytes) -> None:
        self.of, self.kernels, self.used, self.asked = of, b"", None, 0

    def create_runtime_config(self) -> Any:
        return self

    def create_runtime_cache(self) -> Any:
        return self

    def deserialize(self, data: bytes) -> bool:
        if data.startswith(self.of):
            self.kernels = data
        return data.startswith(self.of)

    def serialize(self) -> bytes:
        self.asked += 1
        return self.of + b"+" * self.asked

    def set_runtime_cache(self, cache: Any) -> None:
        self.used = cache

    def create_execution_context(self, config: Any) -> str:
        assert config is self.used is self
        return "context"


def test_kernels_are_kept_and_read_again(tmp_path: Path) -> None:
    first = Engine(b"8.9")
    kept = KernelCache(CacheFile(tmp_path, KERNELS, "plan"))
    assert kept.context(first) == "context"
    for _ in range(9):
        kept.called()
    assert first.asked == 4  # behind the calls 1, 2, 4 and 8
    for of, found, note in ((b"8.9", b"8.9++++", ""), (b"9.0", b"", "TensorRT refuses it")):
        again = Engine(of)
        cache = KernelCache(CacheFile(tmp_path, KERNELS, "plan"))
        cache.context(again)
        assert again.kernels == found
        assert note in cache.file.note


@pytest.mark.gpu
def test_on_a_gpu_the_folder_has_kernels(program: Program, tmp_path: Path) -> None:
    engine: Any = bg.compile(program, backend=TensorRT(cache=str(tmp_path)))
    if engine.unable:
        pytest.skip(f"not run: {engine.unable}")
    engine(**program.example)
    assert os.listdir(tmp_path)
