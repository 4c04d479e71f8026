"""Checkpoints on one process: resumed training is bit-equal; a checkpoint that does not fit is refused, with no change."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

import bmgraph as bg
from bmgraph.backends import SGD, AdamW, Cosine, Torch
from bmgraph.errors import BundleError, InputError
from bmgraph.ir.program import Program
from bmgraph.runtime.training import checkpoint_save
from bmgraph.runtime.training.trainer import Trainer
from bmgraph.serialize.bundle import MANIFEST
from tests.helpers.bundles import edit_json
from tests.runtime.training.test_trainer import Regression, regression

PLAIN = Torch(optimizer=AdamW(lr=1e-2), schedule=Cosine(warmup=2, steps=8))


def built(backend: Torch = PLAIN, frozen: frozenset[str] = frozenset(), seed: int = 0) -> Trainer:
    torch.manual_seed(seed)
    program: Program = bg.capture(Regression(), regression())
    program.frozen = frozen
    trainer: Trainer = bg.compile(program, backend=backend)
    return trainer


@pytest.mark.parametrize(
    "optimizer",
    [
        AdamW(lr=1e-2),
        *(pytest.param(SGD(lr=1e-2, momentum=rate), marks=pytest.mark.slow) for rate in (0.0, 0.9)),
    ],
)
def test_resumed_training_is_bit_equal(tmp_path: Path, optimizer: AdamW | SGD) -> None:
    backend = Torch(optimizer=optimizer, schedule=Cosine(warmup=2, steps=8), seed=3)
    given = [regression() for _ in range(6)]
    first = built(backend)
    for batch in given[:3]:
        first.step(batch)
    first.save(tmp_path / "half")
    second = built(Torch(optimizer=optimizer, schedule=backend.schedule), seed=0)
    second.load(tmp_path / "half")
    assert (second.steps, second.seed) == (3, 3)
    assert [first.step(batch) for batch in given[3:]] == [second.step(batch) for batch in given[3:]]
    after = second.program().parameters
    assert all(torch.equal(tensor, after[name]) for name, tensor in first.program().parameters.items())


@pytest.mark.slow
def test_a_fresh_trainer_is_saved_and_resumed(tmp_path: Path) -> None:
    built().save(tmp_path / "fresh")
    trainer = built()
    trainer.step(regression())
    trainer.load(tmp_path / "fresh")
    batch = regression()
    assert trainer.step(batch) == built().step(batch)


@pytest.mark.slow
def test_a_momentum_that_is_new_begins_at_zero(tmp_path: Path) -> None:
    """A checkpoint of SGD without momentum rightly holds none; one that says that it had some is refused."""
    plain = built(Torch(optimizer=SGD(lr=1e-2)))
    plain.step(regression())
    plain.save(tmp_path / "plain")
    trainer = built(Torch(optimizer=SGD(lr=1e-2, momentum=0.9)))
    with pytest.warns(UserWarning, match=r"momentum 0\.0 -> 0\.9"):
        trainer.load(tmp_path / "plain")
    trainer.save(tmp_path / "saved at once")
    built(Torch(optimizer=SGD(lr=1e-2, momentum=0.9))).load(tmp_path / "saved at once")
    edit_json(tmp_path / "plain" / MANIFEST, lambda manifest: manifest["settings"].update(momentum=0.9))
    with pytest.raises(BundleError, match="lacks SGD's momentum_buffer, which would begin anew"):
        trainer.load(tmp_path / "plain")


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    trainer = built()
    trainer.step(regression())
    trainer.save(tmp_path / "some")
    trainer.program().save(str(tmp_path / "program"))
    other_frozen = built(frozen=frozenset({"up.weight"}), seed=1)
    other_frozen.save(tmp_path / "frozen")
    before = trainer.program().parameters
    for path, message in (
        ("nothing", "there is no such folder"),
        ("program", "is a saved program, not a training checkpoint"),
        ("frozen", "frozen parameter 'up.weight' differs from this program's"),
    ):
        with pytest.raises(BundleError, match=message):
            trainer.load(tmp_path / path)
    with pytest.raises(BundleError, match="was saved with AdamW, this trainer has SGD"):
        built(Torch(optimizer=SGD())).load(tmp_path / "some")
    with pytest.raises(BundleError, match=r"another program: frozen parameter 'up\.weight'"):
        built(frozen=frozenset({"up.weight"})).load(tmp_path / "some")
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.program().parameters.items())
    assert trainer.steps == 1


@pytest.mark.parametrize("file", ["state.safetensors", MANIFEST])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, file: str) -> None:
    trainer = built()
    trainer.save(tmp_path / "some")
    whole = (tmp_path / "some" / file).read_bytes()
    for data in (whole[:-9], whole[:-9] + b"123456789"):
        (tmp_path / "some" / file).write_bytes(data)
        with pytest.raises(BundleError):
            trainer.load(tmp_path / "some")


def test_a_checkpoint_is_not_loaded_as_a_program(tmp_path: Path) -> None:
    built().save(tmp_path / "some")
    with pytest.raises(InputError, match=r"compile the same program again and give it to trainer.load"):
        bg.load(tmp_path / "some")


def test_one_rank_saves_beside_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, batch = built(), regression()
    trainer.step(batch)
    (tmp_path / ".earlier-bmgraph-00abc_de").mkdir()  # a killed process left it
    trainer.save(tmp_path / "beside", wait=False)
    after = trainer.step(batch)
    trainer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["beside"]
    resumed = built()
    resumed.load(tmp_path / "beside")
    assert resumed.step(batch) == after

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(checkpoint_save, "write_file", full)
    trainer.save(tmp_path / "full", wait=False)
    trainer.saver.wait()
    with pytest.raises(BundleError, match="the disk is full: free some space"):
        trainer.step(batch)
    assert [path.name for path in tmp_path.iterdir()] == ["beside"]
    trainer.step(batch)  # told once
