"""Checkpoints of several ranks: each writes its share, any number of ranks resumes, and nothing is left of what failed."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bmgraph.errors import BundleError
from bmgraph.passes import ZeRO
from bmgraph.runtime.training import checkpoint_save
from bmgraph.runtime.training.trainer import Trainer
from bmgraph.serialize.bundle import MANIFEST
from tests.fixtures import write_checkpoints as write
from tests.helpers.bundles import edit_json
from tests.helpers.ranks import run_ranks

KIND = "adamw_2"
CLOSE = 1e-5
FILES = {"computation.txt", MANIFEST, "state-00001-of-00002.safetensors", "state-00002-of-00002.safetensors"}


def built(stage: int) -> Trainer:
    return write.trainer(KIND, (ZeRO(stage),))


def failing(trainer: Trainer, path: Path, rank: int, wait: bool) -> list[str]:
    """What two saves say of which one cannot write on the last rank, whose files are limited to 64 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    said = []
    try:
        trainer.save(path, wait=wait)
        trainer.wait()
    except BundleError as error:
        said.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    trainer.save(path)  # goes on
    return said


def saving(rank: int, folder: str, stage: int) -> dict[str, Any]:
    place = Path(folder)
    trainer = built(stage)
    for seed in range(write.SAVED):
        trainer.step(write.rows(seed))
    trainer.save(place / "waited")
    trainer.save(place / "beside", wait=False)
    losses, after = write.continued(trainer)
    trainer.wait()
    found: dict[str, Any] = {"losses": losses, "after": after}
    again = built(stage)
    again.load(place / "beside")
    found["again"], found["again after"] = write.continued(again)
    found["failed"] = failing(trainer, place / "failed", rank, wait=True)
    found["failed beside"] = failing(trainer, place / "failed beside", rank, wait=False)
    checkpoint_save.is_there = lambda folder: rank == 0
    again.load(place / "beside")
    again.save(place / "gathered", wait=False)
    found["notes"] = again.report.notes
    checkpoint_save.is_there = Path.is_dir
    write_file = checkpoint_save.write_file

    def slowly(file: Path, mode: int, write: Any) -> dict[str, object]:
        time.sleep(0.5)
        return write_file(file, mode, write)

    checkpoint_save.write_file = slowly
    again.save(place / "at the end", wait=False)
    return found  # the process group is destroyed, and the process ends


@pytest.fixture(
    scope="module", params=[3, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 2))]
)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(2, saving, str(folder), request.param)


def test_each_rank_writes_its_share_and_what_went_on_beside_is_not_in_it(
    saved: tuple[Path, list[Any]],
) -> None:
    folder, _ = saved
    assert set(os.listdir(folder / "waited")) == set(os.listdir(folder / "beside")) == FILES
    sizes = []
    for name in sorted(FILES - {"computation.txt", MANIFEST}):
        assert (folder / "waited" / name).read_bytes() == (folder / "beside" / name).read_bytes()
        sizes.append(sum(tensor.numel() for tensor in load_file(folder / "waited" / name).values()))
    assert max(sizes) - min(sizes) < 40, "shares differ by their padding alone"


def test_the_same_ranks_resume_to_equal_bits(saved: tuple[Path, list[Any]]) -> None:
    for found in saved[1]:
        assert torch.equal(found["losses"], found["again"])
        assert all(torch.equal(value, found["again after"][name]) for name, value in found["after"].items())


@pytest.mark.parametrize("name", ["waited", "gathered"])
def test_one_rank_resumes(saved: tuple[Path, list[Any]], name: str) -> None:
    trainer = write.trainer(KIND)
    trainer.load(saved[0] / name)
    losses, after = write.continued(trainer)
    assert torch.allclose(losses, saved[1][0]["losses"], rtol=CLOSE)
    for key, value in saved[1][0]["after"].items():
        assert torch.allclose(after[key], value, rtol=0, atol=CLOSE), key


def test_where_ranks_share_no_folder_rank_0_writes_all(saved: tuple[Path, list[Any]]) -> None:
    assert set(os.listdir(saved[0] / "gathered")) == {"computation.txt", MANIFEST, "state.safetensors"}
    assert any("ranks do not share the folder" in note for note in saved[1][0]["notes"])


def test_the_end_of_a_process_waits_for_what_is_being_written(saved: tuple[Path, list[Any]]) -> None:
    trainer = write.trainer(KIND)
    trainer.load(saved[0] / "at the end")
    assert trainer.steps == write.SAVED


@pytest.mark.parametrize("what", ["failed", "failed beside"])
def test_a_rank_that_cannot_write_fails_all_and_leaves_nothing(
    saved: tuple[Path, list[Any]], what: str
) -> None:
    for found in saved[1]:
        assert len(found[what]) == 1
        assert found[what][0].startswith("rank 1: cannot save ")
        assert "the disk is full" in found[what][0]
    assert set(os.listdir(saved[0] / what)) == FILES, "the save after it"
    assert not [name for name in os.listdir(saved[0]) if name.startswith(".")]


def test_spans_that_are_not_the_parameter_are_refused(saved: tuple[Path, list[Any]], tmp_path: Path) -> None:
    trainer, folder = write.trainer(KIND), tmp_path / "altered"
    before = trainer.program().parameters
    for wrong in ([0, 3], [1, 400], "all of it", [0, True], {"begin": 0}, [-5, 10], [0, 2**62], [7]):
        shutil.copytree(saved[0] / "waited", folder, dirs_exist_ok=True)

        def alter(manifest: dict[str, Any], wrong: object = wrong) -> None:
            of_file = next(found for found in manifest["spans"].values() if found)
            of_file[next(iter(of_file))] = wrong

        edit_json(folder / MANIFEST, alter)
        with pytest.raises(BundleError, match=r"span|pieces"):
            trainer.load(folder)
    assert all(torch.equal(value, before[name]) for name, value in trainer.program().parameters.items())
