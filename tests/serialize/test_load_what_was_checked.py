"""What was hashed and admitted is what is loaded, and what was loaded stays what it was, whatever happens to its folder."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import Onnx
from bmgraph.errors import BundleError
from bmgraph.runtime.ort import bundled_models, load, model_files
from bmgraph.runtime.ort.engine import OrtEngine
from bmgraph.serialize.bundle import read_bundle
from bmgraph.serialize.opened import OpenedFile, open_regular_file
from bmgraph.serialize.safetensors_io import open_tensors, read_tensors, write_tensors
from tests.helpers.paths import ROOT

X = {"input": torch.ones(2, 64)}


def _engine(fill: float) -> OrtEngine:
    """An engine whose weights, all `fill`, lie in the file beside the model."""
    model = nn.Linear(64, 64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(fill)
    made: OrtEngine = bg.compile(model.eval(), example=(torch.ones(3, 64),), backend=Onnx(threads=1))
    assert "model.onnx.data" in made.files.opened
    return made


@pytest.fixture(scope="module")
def engines() -> tuple[OrtEngine, OrtEngine]:
    return _engine(0.5), _engine(0.25)


def _first(engine: OrtEngine) -> float:
    return float(next(iter(engine(**X).values()))[0, 0])


def test_an_engine_that_is_saved_anew_while_it_is_loaded_stays_whole(
    engines: tuple[OrtEngine, OrtEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another save between every two steps: model and weights are those of the first."""
    engines[0].save(tmp_path / "engine")
    admit, session = bundled_models.admit, model_files.make_session

    def saved_then(step):  # type: ignore[no-untyped-def]
        def run(*arguments):  # type: ignore[no-untyped-def]
            engines[1].save(tmp_path / "engine")
            return step(*arguments)

        return run

    monkeypatch.setattr(bundled_models, "admit", saved_then(admit))
    monkeypatch.setattr(model_files, "make_session", saved_then(session))
    assert _first(bg.load(tmp_path / "engine")) == _first(engines[0])
    monkeypatch.undo()
    assert _first(bg.load(tmp_path / "engine")) == _first(engines[1])


def test_onnx_runtime_is_given_the_bytes_that_were_admitted(
    engines: tuple[OrtEngine, OrtEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that are overwritten in place after admission change nothing."""
    engines[0].save(tmp_path / "engine")
    admit = bundled_models.admit

    def overwritten(*arguments):  # type: ignore[no-untyped-def]
        found = admit(*arguments)
        for name in ("model.onnx", "model.onnx.data"):
            (tmp_path / "engine" / name).write_bytes(b"\xff" * 99)
        return found

    monkeypatch.setattr(bundled_models, "admit", overwritten)
    assert _first(bg.load(tmp_path / "engine")) == _first(engines[0])


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "example.safetensors"])
def test_a_file_that_is_overwritten_between_hashing_and_reading_is_refused(
    engines: tuple[OrtEngine, OrtEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    engines[0].save(tmp_path / "engine")
    real = bg.loading.read_bundle

    def overwritten(path: Path) -> object:
        bundle, file = real(path), path / name
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        status = file.stat()
        with open(file, "r+b") as stream:
            stream.write(data)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        return bundle

    monkeypatch.setattr(bg.loading, "read_bundle", overwritten)
    with pytest.raises(BundleError, match=rf"'{name}' in bundle .* was altered after it was checked"):
        bg.load(tmp_path / "engine")


CUT = """
import os, sys, torch, bmgraph as bg
engine = bg.load(sys.argv[1])
batch = {"input": torch.ones(2, 64)}
assert "sympy" not in sys.modules  # 40 MB, which running an engine does without
before = next(iter(engine(**batch).values()))
for name in ("model.onnx", "model.onnx.data"):
    os.truncate(os.path.join(sys.argv[1], name), 0)
for _ in range(3):
    assert torch.equal(next(iter(engine(**batch).values())), before)
print("held")
"""


def test_files_that_are_cut_later_do_not_end_the_process(
    engines: tuple[OrtEngine, OrtEngine], tmp_path: Path
) -> None:
    """A map of a file that was cut ends the process with SIGBUS: weights of a bundle are not mapped."""
    engines[0].save(tmp_path / "engine")
    done = subprocess.run(
        [sys.executable, "-c", CUT, str(tmp_path / "engine")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.stdout == "held\n", (done.returncode, done.stderr[-500:])


def test_large_weights_are_mapped_from_a_private_copy(
    engines: tuple[OrtEngine, OrtEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What becomes of the bundle later changes nothing; a file that is not what was hashed is refused; without room for a copy
    weights are read into memory."""
    monkeypatch.setattr(load, "MAPPED", 0)
    engines[0].save(tmp_path / "engine")
    made = bg.load(tmp_path / "engine")
    assert isinstance(made, OrtEngine)
    assert made.files.are_mapped
    assert made.folder != tmp_path / "engine"
    for name in ("model.onnx", "model.onnx.data"):
        os.truncate(tmp_path / "engine" / name, 0)
    assert _first(made) == _first(engines[0])
    made.save(tmp_path / "again")
    folder = made.folder
    del made
    gc.collect()
    assert not folder.exists()
    copy_to = OpenedFile.copy_to

    def full(file: OpenedFile, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(OpenedFile, "copy_to", full)
    made = bg.load(tmp_path / "again")
    assert isinstance(made, OrtEngine)
    assert not made.files.are_mapped
    assert _first(made) == _first(engines[0])

    def altered(file: OpenedFile, target: Path) -> None:
        with open(file.path, "r+b") as stream:
            stream.write(b"\xff" * 9)
        copy_to(file, target)

    monkeypatch.setattr(OpenedFile, "copy_to", altered)
    with pytest.raises(BundleError, match="was altered after it was checked"):
        bg.load(tmp_path / "again")


def test_a_loaded_engine_saves_itself_whatever_became_of_its_folder(
    engines: tuple[OrtEngine, OrtEngine], tmp_path: Path
) -> None:
    engines[0].save(tmp_path / "engine")
    loaded = bg.load(tmp_path / "engine")
    engines[1].save(tmp_path / "engine")
    loaded.save(tmp_path / "of saved anew")
    shutil.rmtree(tmp_path / "engine")
    loaded.save(tmp_path / "of gone")
    loaded.save(tmp_path / "engine")
    for name in ("of saved anew", "of gone", "engine"):
        assert _first(bg.load(tmp_path / name)) == _first(engines[0])


def test_a_loaded_engine_does_not_save_files_that_were_overwritten(
    engines: tuple[OrtEngine, OrtEngine], tmp_path: Path
) -> None:
    engines[0].save(tmp_path / "engine")
    loaded = bg.load(tmp_path / "engine")
    (tmp_path / "engine" / "model.onnx.data").write_bytes(b"\0" * 20_000)
    with pytest.raises(
        BundleError, match=r"'model\.onnx\.data' in bundle .* was altered after it was checked"
    ):
        loaded.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_unsaved_engine_survives_its_folder(tmp_path: Path) -> None:
    engine = _engine(0.5)
    shutil.rmtree(engine.folder)
    engine.save(tmp_path / "engine")
    assert _first(bg.load(tmp_path / "engine")) == _first(engine)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_leaves_the_files_of_its_parent() -> None:
    script = (
        "import os, sys\n"
        "from bmgraph.runtime.temporary import delete_with, folder_for_engine\n"
        "class Owner: pass\n"
        "owner = Owner()\n"
        "with folder_for_engine() as made:\n"
        "    delete_with(owner, made)\n"
        "folder = made.path\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    sys.exit(0)\n"
        "os.waitpid(child, 0)\n"
        "print(folder.exists())\n"
        "del owner\n"
        "print(folder.exists())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.stdout.split() == ["True", "False"], done.stderr[-500:]


def test_tensors_are_compared_with_their_checksum_as_they_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write_tensors(file, {"a": torch.arange(9.0), "b": torch.arange(4)})
    opened = open_regular_file(file)
    assert opened.check(opened.sha256())
    with open(file, "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\1")
    with pytest.raises(BundleError, match="altered after it was checked"):
        read_tensors(opened)


def test_tensors_that_are_read_one_by_one_are_refused_if_written_to_meanwhile(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write_tensors(file, {"a": torch.arange(9.0)})

    def read_while_written_to() -> None:
        with open_tensors(file) as stored:
            stored.read("a")
            os.utime(file, ns=(0, 0))

    with pytest.raises(BundleError, match="altered after it was checked"):
        read_while_written_to()


def test_tensors_that_are_overwritten_while_they_are_read_are_refused(tmp_path: Path) -> None:
    """Even where the time of the write is set back, and the contents are restored before the end."""
    file = tmp_path / "a.safetensors"
    write_tensors(file, {"a": torch.arange(400_000.0), "b": torch.arange(400_000.0)})
    opened, data, status = open_regular_file(file), file.read_bytes(), file.stat()
    assert opened.check(opened.sha256())

    def overwrite(contents: bytes) -> None:
        with open(file, "r+b") as stream:
            stream.write(contents)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    def read_while_overwritten() -> None:
        with open_tensors(opened) as stored:
            assert torch.equal(stored.read("a"), torch.arange(400_000.0))
            overwrite(data[:-4] + b"\0\0\0\1")
            try:
                stored.read("b")
            finally:
                overwrite(data)

    with pytest.raises(BundleError, match="altered after it was checked"):
        read_while_overwritten()


def test_a_time_of_writing_that_was_set_back_is_told(tmp_path: Path) -> None:
    """Of a file without a checksum; one that has lost its name is what it was."""
    file, gone = tmp_path / "a", tmp_path / "gone"
    file.write_bytes(b"1")
    gone.write_bytes(b"1")
    opened, nameless, status = open_regular_file(file), open_regular_file(gone), file.stat()
    time.sleep(0.02)
    gone.unlink()
    nameless.check_unwritten()
    with open(file, "r+b") as stream:
        stream.write(b"2")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(BundleError, match="altered after it was checked"):
        opened.check_unwritten()


def test_threads_read_one_opened_file_at_their_own_positions(tmp_path: Path) -> None:
    data = np.arange(2**18, dtype=np.uint32).tobytes()
    (tmp_path / "file").write_bytes(data)
    opened = open_regular_file(tmp_path / "file")
    found: list[bool] = []

    def read() -> None:
        found.extend(opened.read() == data for _ in range(20))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 80


def test_a_bundle_is_read_whole_or_not(tmp_path: Path, engines: tuple[OrtEngine, OrtEngine]) -> None:
    engines[0].save(tmp_path / "engine")
    bundle = read_bundle(tmp_path / "engine")
    assert all(file.expected for file in bundle.opened.values())
