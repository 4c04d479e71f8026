"""Distilling the teacher's likeliest classes: the loss is that of a naive formula, and a cache holds little more than them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import bmgraph as bg
from bmgraph.backends import AdamW, Torch
from bmgraph.errors import InputError
from bmgraph.passes import Distill, ZeRO
from bmgraph.passes.distill.likeliest import Likeliest
from bmgraph.passes.distill.teacher_cache import CHECKSUM, _checksum
from bmgraph.serialize.safetensors_io import write_tensors
from tests.helpers.models import tiny_encoder, tokens
from tests.helpers.ranks import run_ranks
from tests.helpers.recorded_losses import recorded_losses
from tests.passes.test_distill_cache import distilled, files, setting

RATE = 1e-3


def naive(student: torch.Tensor, teacher: torch.Tensor, count: int, temperature: float) -> torch.Tensor:
    """KL(teacher, student) over the `count` likeliest classes of the teacher and the rest as one, in float64, class by class."""
    total = []
    for mine, theirs in zip(student.double().flatten(0, -2), teacher.double().flatten(0, -2)):
        q, p = (mine / temperature).softmax(-1), (theirs / temperature).softmax(-1)
        kept = theirs.sort(descending=True).indices[:count].tolist()
        rest = [place for place in range(len(p)) if place not in kept]
        terms = [(p[place], q[place]) for place in kept] + [(p[rest].sum(), q[rest].sum())]
        total.append(sum(a * (a / b).log() for a, b in terms if a > 0) * temperature**2)
    return torch.stack(total).reshape(student.shape[:-1])


def without_dropout(layers: int) -> nn.Module:
    found = tiny_encoder(layers)
    for module in found.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return found


def curve(student: nn.Module, teacher: nn.Module, text: list[Any], steps: int, count: int) -> list[float]:
    """The losses of a plain loop at temperature 2, over tokens that are not padding."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, weight_decay=0.01)
    found = []
    for step in range(steps):
        batch = text[step % len(text)]
        with torch.no_grad():
            wanted = teacher(**batch)["logits"]
        each, mask = naive(student(**batch)["logits"], wanted, count, 2.0), batch["attention_mask"]
        loss = (each * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def _curve(rank: int, count: int, passes: tuple[ZeRO, ...], accumulate: int = 1) -> list[float]:
    program, text = bg.capture(without_dropout(1), tokens()), setting()[2]
    trainer = Torch(optimizer=AdamW(lr=RATE, no_decay=False), passes=passes, accumulate=accumulate)
    resources = {"teacher": bg.capture(without_dropout(2), tokens()), "text": text, "trainer": trainer}
    with recorded_losses() as found:
        bg.Pipeline([Distill(steps=4, temperature=2.0, top_k=count)]).run(program, resources=resources)
    return found


def expected(count: int) -> list[float]:
    return curve(without_dropout(1), without_dropout(2), setting()[2], 4, count)


def test_the_curve_of_a_plain_loop() -> None:
    assert _curve(0, 5, (), 3) == pytest.approx(expected(5), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 23])
def test_the_curve_with_one_class_and_with_all_but_one(count: int) -> None:
    assert _curve(0, count, ()) == pytest.approx(expected(count), rel=1e-5)


@pytest.mark.slow
def test_the_curve_on_two_ranks() -> None:
    for found in run_ranks(2, _curve, 5, (ZeRO(3),)):
        assert found == pytest.approx(expected(5), rel=1e-5)


@pytest.mark.slow
def test_all_classes_are_the_plain_divergence() -> None:
    program, teacher, text = setting()
    plain = distilled(program, teacher, text, None)
    found = distilled(program, teacher, text, None, Distill(steps=3, top_k=24))
    assert all(torch.equal(plain.parameters[name], item) for name, item in found.parameters.items())


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 8),
    st.floats(0.25, 8.0),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.floats(0.1, 60.0),
    st.integers(0, 1000),
)
def test_what_is_kept_sums_to_one(
    count: int, heat: float, dtype: torch.dtype, loud: float, seed: int
) -> None:
    """Also where nearly all of the mass is kept, and where classes are ruled out (-inf)."""
    logits = (loud * torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(seed))).to(dtype)
    logits[0, 0, 1:] = float("-inf")
    kept = Likeliest("logits", count, heat)
    values = kept.of(logits)
    log_p, classes = values[kept.probabilities], values[kept.classes].long()
    assert log_p.isfinite().all()
    assert log_p.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    p = (logits.double() / heat).softmax(-1)
    rest = p.scatter(-1, classes, 0.0).sum(-1, keepdim=True)
    tight = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(
        log_p.double().exp(), torch.cat([p.gather(-1, classes), rest], -1), rtol=tight, atol=1e-30
    )


@pytest.mark.slow
def test_a_cache_of_the_likeliest_is_small_and_read_again(tmp_path: Path) -> None:
    program, teacher, text = setting()
    item = Distill(steps=3, top_k=2, temperature=2.0)
    plain = distilled(program, teacher, text, None, item)
    computed = teacher.calls
    for _ in range(2):
        found = distilled(program, teacher, text, tmp_path, item)
        assert teacher.calls == computed + 2
        assert all(torch.equal(plain.parameters[name], value) for name, value in found.parameters.items())
    assert all(file.stat().st_size < 3 * 8 * (3 + 2) * 4 + 500 for file in files(tmp_path))
    assert found.history[-1].text == "distill{steps=3,temperature=2.0,top_k=2}"
    distilled(program, teacher, text, tmp_path, Distill(steps=3, top_k=2, temperature=2.0000001))
    assert len(files(tmp_path)) == 4  # nothing of another temperature is read


@pytest.mark.slow
def test_classes_that_are_not_there_are_computed_again(tmp_path: Path) -> None:
    """A file whose checksum holds, and whose classes are outside the vocabulary."""
    program, teacher, text = setting()
    item = Distill(steps=2, top_k=2)
    plain = distilled(program, teacher, text, tmp_path, item)
    for file in files(tmp_path):
        held = load_file(file)
        (classes,) = (name for name, value in held.items() if value.dtype == torch.int32)
        values = [held[str(place)] + (24 if str(place) == classes else 0) for place in range(len(held) - 1)]
        write_tensors(
            file, {**{str(place): value for place, value in enumerate(values)}, CHECKSUM: _checksum(values)}
        )
    with pytest.warns(UserWarning, match="computed again: input 'teacher_0_classes' holds"):
        found = distilled(program, teacher, text, tmp_path, item)
    assert all(torch.equal(plain.parameters[name], value) for name, value in found.parameters.items())


def test_bad_options_are_one_error() -> None:
    for options in ({"top_k": -1}, {"top_k": 4, "on": "hidden"}):
        with pytest.raises(InputError, match="give how many logits to keep, with on='logits'"):
            Distill(**options)  # type: ignore[arg-type]
