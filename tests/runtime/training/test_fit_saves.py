"""`fit(save_wait=False)`: checkpoints are written beside the next steps, and the last whole one is never given up for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bmgraph as bg
from bmgraph.backends import SGD, Torch
from bmgraph.errors import BundleError
from bmgraph.runtime.training import checkpoint_save
from bmgraph.runtime.training.trainer import Trainer
from tests.helpers.paths import ROOT
from tests.helpers.words import Batch, batch_of, captured_words


def built() -> Trainer:
    trainer: Trainer = bg.compile(captured_words(), backend=Torch(optimizer=SGD(lr=0.1)), verify="off")
    return trainer


def saved(folder: Path) -> set[str]:
    return {name for name in os.listdir(folder) if name.startswith("step-")}


class Held:
    """Holds back the second checkpoint, at its tensors, until it is let go, or lets it fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: bool = False) -> None:
        self.go, self.begun, self.calls = threading.Event(), threading.Event(), 0
        write = checkpoint_save.stream_tensors

        def held(*args: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == 2:
                self.begun.set()
                assert self.go.wait(100)
                if fails:
                    raise OSError(28, "No space left on device")
            return write(*args, **options)

        monkeypatch.setattr(checkpoint_save, "stream_tensors", held)


@pytest.mark.slow
def test_the_last_whole_one_stays_while_the_next_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, seen = Held(monkeypatch), []

    def loader() -> Iterator[Batch]:
        for index in range(4):
            if index == 2:  # the checkpoint of step 2 is being written
                assert held.begun.wait(100)
                seen.append(saved(tmp_path))
                held.go.set()
            yield batch_of(index)

    trainer, whole = built(), built()
    done = trainer.fit(loader(), 4, save=tmp_path, save_every=1, keep=1, save_wait=False)
    assert seen == [{"step-00000001"}]
    assert saved(tmp_path) == {"step-00000004"}
    assert done.path == tmp_path / "step-00000004"
    for index in range(4):
        whole.step(batch_of(index))
    resumed = built()
    resumed.load(tmp_path / "step-00000004")
    for name, value in whole.program().parameters.items():
        assert torch.equal(resumed.program().parameters[name], value), name


def test_one_that_fails_is_an_error_and_the_former_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch, fails=True)
    held.go.set()
    with pytest.raises(BundleError, match="the disk is full"):
        built().fit([batch_of(0)], 2, save=tmp_path, save_every=1, keep=1, save_wait=False)
    assert saved(tmp_path) == {"step-00000001"}
    resumed = built()
    resumed.fit([batch_of(0)], 1, save=tmp_path, resume="auto")
    assert resumed.steps == 1


KILLED = """
import os, signal, sys
from pathlib import Path
from bmgraph.runtime.training import checkpoint_save
from tests.helpers.words import batch_of
from tests.runtime.training.test_fit_saves import built
write, calls = checkpoint_save.stream_tensors, []
def held(*args, **options):
    calls.append(1)
    written = write(*args, **options)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return written
checkpoint_save.stream_tensors = held
built().fit([batch_of(0), batch_of(1)], 6, save=Path(sys.argv[1]), save_every=1, keep=1, save_wait=False)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_beside_a_save_resumes_from_the_former(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert saved(tmp_path) == {"step-00000001"}
    resumed, whole = built(), built()
    found = resumed.fit([batch_of(0), batch_of(1)], 3, save=tmp_path, resume="auto")
    assert found.loss == whole.fit([batch_of(0), batch_of(1)], 3).loss
