"""Runs of passes that are stopped after some of their work was kept, as a killed process leaves it, and go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

import bmgraph as bg
from bmgraph.api import Program
from bmgraph.pass_manager import resume_folder

Run = Callable[[Path | None], Program]
"""Runs passes on a program, with a folder to go on in or without one."""


class Stopped(BaseException):
    """Ends a run as a signal would: nothing handles it."""


@contextmanager
def stopping(after: int) -> Iterator[list[str]]:
    """Stop once `after` files were kept; gives the names of those that were."""
    kept: list[str] = []
    write = resume_folder.write_values

    def counted(file: Path, value: object) -> int:
        if len(kept) == after:
            raise Stopped
        size = write(file, value)
        kept.append(file.name)
        return size

    with patch.object(resume_folder, "write_values", counted):
        yield kept


def is_stopped(run: Run, folder: Path, after: int) -> bool:
    """Whether a run was stopped after it had kept so many files."""
    try:
        with stopping(after):
            run(folder)
    except Stopped:
        return True
    return False


def assert_same(one: Program, other: Program) -> None:
    """Two programs are bit-equal: graphs, tensors, and what their history says."""
    assert str(one) == str(other)
    mine, theirs = one.tensors(), other.tensors()
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8) if tensor.dim() else tensor, theirs[name].view(torch.uint8) if tensor.dim() else theirs[name]), name  # fmt: skip
    assert [replace(record, machine={}) for record in one.history] == [
        replace(record, machine={}) for record in other.history
    ]
    for field in ("ties", "frozen", "trained_whole", "lr_factors", "step_rules", "fingerprint", "training"):
        assert getattr(one, field) == getattr(other, field), field
    assert {name: item.inputs for name, item in one.signatures.items()} == {
        name: item.inputs for name, item in other.signatures.items()
    }


__all__ = ["Run", "Stopped", "assert_same", "bg", "is_stopped", "stopping"]
