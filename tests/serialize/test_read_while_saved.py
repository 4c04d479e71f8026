"""A bundle that is saved anew while it is read: what was opened stays what it was; several savers leave one whole bundle."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from bmgraph.errors import BundleError
from bmgraph.serialize.bundle import read_bundle, write_bundle
from bmgraph.serialize.opened import OpenedFile, OpenedFolder
from bmgraph.serialize.safetensors_io import read_tensors, write_tensors

by_folder = pytest.mark.skipif(os.open not in os.supports_dir_fd, reason="this system opens files by name")


def save(path: Path, number: float) -> None:
    """Two files that say by their values which save they are of."""
    tensors = {"a": torch.full((50,), number), "b": torch.full((50,), number)}
    write_bundle(
        path,
        "program",
        {"number": number},
        {name: (lambda file, name=name: write_tensors(file, {name: tensors[name]})) for name in tensors},  # type: ignore[misc]
    )


def numbers(path: Path) -> set[float]:
    bundle = read_bundle(path)
    found = {read_tensors(bundle.open(name))[name].unique().item() for name in ("a", "b")}
    return {*found, bundle.manifest["number"]}


@by_folder
def test_what_was_opened_is_what_is_read(tmp_path: Path) -> None:
    save(tmp_path / "bundle", 1.0)
    bundle = read_bundle(tmp_path / "bundle")
    save(tmp_path / "bundle", 2.0)
    assert read_tensors(bundle.open("a"))["a"].unique().tolist() == [1.0]
    assert read_tensors(bundle.open("b"))["b"].unique().tolist() == [1.0]
    assert numbers(tmp_path / "bundle") == {2.0}


@by_folder
@pytest.mark.parametrize("first", ["manifest.json", "b"])
def test_a_folder_that_is_replaced_while_it_is_opened_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    save(tmp_path / "bundle", 1.0)
    opened, saved = OpenedFolder.open, []

    def replace_before(self: OpenedFolder, name: str) -> OpenedFile:
        if name == first and len(saved) < 2:
            saved.append(name)
            save(self.path, 1.0 + len(saved))
        return opened(self, name)

    monkeypatch.setattr(OpenedFolder, "open", replace_before)
    assert numbers(tmp_path / "bundle") == {3.0}
    assert len(saved) == 2


@pytest.mark.parametrize("exchanges", [True, False])
def test_two_savers_leave_one_whole_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    if not exchanges:
        monkeypatch.setattr("bmgraph.serialize.bundle._exchange", lambda *_: False)
    failed: list[Exception] = []

    def saver(number: float) -> None:
        try:
            for _ in range(15):
                save(tmp_path / "bundle", number)
        except BundleError as error:
            failed.append(error)

    savers = [threading.Thread(target=saver, args=(float(number),)) for number in range(3)]
    for thread in savers:
        thread.start()
    for thread in savers:
        thread.join()
    assert not failed
    assert len(numbers(tmp_path / "bundle")) == 1
    assert os.listdir(tmp_path) == ["bundle"]
