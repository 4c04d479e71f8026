"""Compiled regions of a step: nothing changes but the kernels; what differs or cannot be compiled runs as it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import bmgraph as bg
from bmgraph.backends import AdamW, Torch
from bmgraph.pass_manager.pass_base import StepPass
from bmgraph.passes import ParallelHead, Remat, ZeRO
from bmgraph.runtime.training.trainer import Trainer
from tests.helpers.ranks import run_ranks
from tests.helpers.training import batches, captured_to_train

OPTIONS: dict[str, tuple[tuple[StepPass, ...], dict[str, Any]]] = {
    "gpt2": ((ZeRO(1),), {"accumulate": 3}),
    "llama": ((Remat("auto"), ZeRO(3, prefetch=1), ParallelHead()), {"optimizer_in_backward": True}),
    "bert": ((Remat("layers"),), {"precision": "bf16"}),
    "t5": ((ZeRO(3),), {"clip_norm": 1.0}),
}
Compiled = Callable[..., Any]


def trainer_of(name: str, compiled: bool) -> Trainer:
    passes, options = OPTIONS[name]
    backend = Torch(optimizer=AdamW(lr=1e-3), torch_compile=compiled, **options)
    return bg.compile(captured_to_train(name), passes=passes, backend=backend, verify="off")


def losses(trainer: Trainer, name: str) -> list[float]:
    return [trainer.step(batch).loss for batch in batches(name, 3)]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "gpt2")) for name in OPTIONS]
)
def test_the_same_calls_in_regions_give_equal_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **options: partial(module))
    trainer = trainer_of(name, compiled=True)
    assert losses(trainer, name) == losses(trainer_of(name, compiled=False), name)
    regions = trainer.regions
    assert regions is not None
    assert regions.places > len(regions.by_structure) > 2  # equal layers share theirs
    assert (regions.kept_apart, regions.failed) == ([], "")
    assert sum(region.compiled for region in regions.by_structure.values()) > 2


def test_a_region_that_differs_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: Compiled, **options: Any) -> Compiled:
        return lambda *values: tuple(
            value * 1.001 if value.is_floating_point() else value for value in module(*values)
        )

    monkeypatch.setattr(torch, "compile", wrong)
    trainer = trainer_of("gpt2", compiled=True)
    assert losses(trainer, "gpt2") == losses(trainer_of("gpt2", compiled=False), "gpt2")
    assert trainer.regions is not None
    assert len(trainer.regions.kept_apart) > 2


def test_a_region_is_compared_again_at_other_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a compiler makes for other sizes is another kernel."""

    def wrong_later(module: Compiled, **options: Any) -> Compiled:
        seen: set[tuple[torch.Size, ...]] = set()

        def call(*values: Any) -> Any:
            seen.add(tuple(value.shape for value in values if isinstance(value, torch.Tensor)))
            found = module(*values)
            return tuple(value * len(seen) if value.is_floating_point() else value for value in found)

        return call

    monkeypatch.setattr(torch, "compile", wrong_later)
    trainer = trainer_of("gpt2", compiled=True)
    assert losses(trainer, "gpt2") == losses(trainer_of("gpt2", compiled=False), "gpt2")


def test_without_a_compiler_a_step_runs_as_it_is_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(module: Compiled, **options: Any) -> Compiled:
        def fails(*values: Any) -> Any:
            raise RuntimeError("no C++ compiler")

        return fails

    monkeypatch.setattr(torch, "compile", none)
    trainer = trainer_of("gpt2", compiled=True)
    with pytest.warns(
        UserWarning, match=r"runs as it is, since torch\.compile fails: no C\+\+ compiler"
    ) as told:
        found = losses(trainer, "gpt2")
    assert len(told) == 1
    assert found == losses(trainer_of("gpt2", compiled=False), "gpt2")


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_compiled_kernels_give_the_losses_of_the_calls(name: str) -> None:
    trainer = trainer_of(name, compiled=True)
    found, expected = losses(trainer, name), losses(trainer_of(name, compiled=False), name)
    assert found == pytest.approx(expected, rel=1e-3 if name == "bert" else 1e-6)
    assert trainer.regions is not None
    assert (trainer.regions.kept_apart, trainer.regions.failed) == ([], "")


def _on_ranks(rank: int) -> tuple[list[float], int]:
    trainer = trainer_of("llama", compiled=True)
    assert trainer.regions is not None
    return losses(trainer, "llama"), trainer.regions.places


@pytest.mark.slow
def test_regions_on_ranks() -> None:
    expected = losses(trainer_of("llama", compiled=False), "llama")
    for found, places in run_ranks(2, _on_ranks):
        assert found == pytest.approx(expected, rel=1e-6)
        assert places > 10
