"""The cache of a teacher's values: what is in it is not computed again, and what was altered is."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import bmgraph as bg
from bmgraph.errors import InputError, ResourceError
from bmgraph.ir.program import Program
from bmgraph.passes import Distill
from bmgraph.passes.distill.teacher import Teacher
from bmgraph.passes.distill.teacher_cache import CHECKSUM, SUFFIX, TeacherCache, _checksum
from bmgraph.serialize.safetensors_io import write_tensors
from tests.helpers.models import tiny_encoder, tokens


class Counted:
    """A teacher without a program, which counts its calls."""

    def __init__(self, program: Program) -> None:
        self.program, self.calls = program, 0
        self.inputs, self.outputs, self.report = program.inputs, program.outputs, Weights()

    def __call__(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        return self.program(**batch)


class Weights:
    """What the digest of an engine reads."""

    backend, weights = "counted", "0"


def setting() -> tuple[Program, Counted, list[dict[str, torch.Tensor]]]:
    teacher = Counted(bg.capture(tiny_encoder(2), tokens()))
    return bg.capture(tiny_encoder(1), tokens()), teacher, [tokens(3, 8, seed) for seed in range(2)]


def distilled(
    program: Program, teacher: Any, text: Any, folder: Path | None, item: Distill | None = None
) -> Program:
    given = {"teacher": teacher, "text": text} | ({} if folder is None else {"cache": folder})
    return bg.Pipeline([item or Distill(steps=3)]).run(program, resources=given)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}"))


def test_what_is_in_it_is_not_computed(tmp_path: Path) -> None:
    program, teacher, text = setting()
    plain = distilled(program, teacher, text, None)
    assert teacher.calls == 3
    folder = tmp_path / "cache"
    for _ in range(2):
        found = distilled(program, teacher, text, folder)
        assert teacher.calls == 5  # each of the two batches once; the second run computes nothing
        assert all(torch.equal(plain.parameters[name], item) for name, item in found.parameters.items())
    assert len(files(folder)) == 2
    assert found.history[-1].text == plain.history[-1].text
    assert "cache" not in found.history[-1].resources


def test_what_differs_has_a_file_of_its_own(tmp_path: Path) -> None:
    """Another batch, other values that are asked for, another teacher."""
    counted = setting()[1]
    teacher = Teacher.of(counted, tokens())
    one, other = (TeacherCache(tmp_path, teacher, name, 10**6) for name in ("one", "other"))
    asked = [
        (one, tokens(), {"logits"}), (one, tokens(seed=3), {"logits"}), (one, tokens(), {"hidden"}),
        (one, tokens(), {"logits", "hidden"}), (other, tokens(), {"logits"}),
    ]  # fmt: skip
    for _ in range(2):
        for cache, batch, names in asked:
            assert cache.values(batch, names, lambda _: None).keys() == names
        assert counted.calls == len(files(tmp_path)) == len(asked)


def damaged(kind: str, file: Path) -> None:
    held = file.read_bytes()
    if kind == "cut":
        file.write_bytes(held[:-5])
    elif kind == "altered":
        file.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
    elif kind == "pickle":
        file.write_bytes(b"\x08\0\0\0\0\0\0\0cos\nsys.")
    elif kind == "huge header":
        file.write_bytes(b"\xff" * 8 + held[8:])
    elif kind == "link":
        (file.parent / "elsewhere").write_bytes(held)
        file.unlink()
        file.symlink_to(file.parent / "elsewhere")
    else:  # whole, and with values of another shape
        values = [torch.zeros(3, 8, 5)]
        write_tensors(file, {"0": values[0], CHECKSUM: _checksum(values)})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", "a size that differs from its data"),
        ("altered", "does not hold what was written: its checksum differs"),
        ("pickle", "unreadable header"),
        ("huge header", "claims a header of"),
        ("link", "not a regular file"),
        ("other shape", "teacher_0"),
    ],
)
def test_what_was_altered_is_computed_again(kind: str, message: str, tmp_path: Path) -> None:
    teacher = Teacher.of(Counted(bg.capture(tiny_encoder(2), tokens())), tokens())
    cache, batch = TeacherCache(tmp_path, teacher, "teacher", 10**6), tokens(3, 8)

    def fits(values: Any) -> None:
        if values["logits"].shape[-1] != 24:
            raise InputError("input 'teacher_0' has another size")

    expected = cache.values(batch, {"logits"}, fits)["logits"]
    (file,) = files(tmp_path)
    held = file.read_bytes()
    damaged(kind, file)
    with pytest.warns(UserWarning, match=message):
        found = cache.values(batch, {"logits"}, fits)["logits"]
    assert torch.equal(found, expected)
    assert file.read_bytes() == held
    assert not file.is_symlink()
    if kind == "link":
        assert (tmp_path / "elsewhere").read_bytes() == held  # never written through
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(cache.values(batch, {"logits"}, fits)["logits"], expected)


@pytest.mark.slow
def test_it_holds_no_more_than_its_limit(tmp_path: Path) -> None:
    program, teacher, text = setting()
    size = 3 * 8 * 24 * 4
    item = Distill(steps=6, cache_limit=f"{size + 500}B")
    with pytest.warns(UserWarning, match="is full"):
        distilled(program, teacher, text, tmp_path, item)
    assert len(files(tmp_path)) == 1
    assert sum(file.stat().st_size for file in files(tmp_path)) <= size + 500
    assert teacher.calls == 1 + 3
    (tmp_path / "file").write_text("")
    for folder, message in (
        (tmp_path / "file", "cannot be a folder"),
        (3, "resource 'cache' is a int: give the path of a folder"),
    ):
        with pytest.raises(ResourceError, match=message):
            distilled(program, teacher, text, folder)


def test_a_teacher_with_a_smaller_vocabulary_is_one_error() -> None:
    program, _, text = setting()
    small = tiny_encoder(2)
    small.embed = torch.nn.Embedding(20, 32)
    few = {**text[0], "ids": text[0]["ids"] % 20}
    with pytest.raises(
        ResourceError, match="the teacher does not take a batch of the distillation data: input 'ids' holds"
    ):
        distilled(program, bg.capture(small, few), text, None, Distill(steps=1, on="hidden"))
