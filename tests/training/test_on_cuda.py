"""On a CUDA device, one rank of NCCL: what trains and runs on the host gives the same there."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import bmgraph as bg
from bmgraph.backends import AdamW, Torch
from bmgraph.ir.program import Program
from bmgraph.pass_manager.pass_base import ModelPass, StepPass
from bmgraph.passes import LoRA, Offload, ParallelHead, Prune, Quantize, Remat, ZeRO
from bmgraph.runtime.training.trainer import Trainer
from tests.helpers.captured import NAMES, captured, distance
from tests.helpers.models import tiny_decoder, tokens
from tests.helpers.training import Batch, batches, captured_to_train, labelled, naive_losses, toy
from tests.helpers.zoo import BY_NAME

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
RULE = AdamW(lr=1e-3, weight_decay=0.0)
STEPS = 8


@pytest.fixture(scope="module", autouse=True)
def exact_products() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def ranks() -> Iterator[None]:
    """A process group of one rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def placed(batch: Batch) -> Batch:
    return {name: value.to(DEVICE) for name, value in batch.items()}


def moved(name: str) -> Program:
    """Captured on the host, then moved."""
    return captured_to_train(name).to(DEVICE)


def trainer_of(program: Program, *passes: ModelPass | StepPass, **options: Any) -> Trainer:
    backend = Torch(optimizer=RULE, **options)
    return bg.compile(program, passes=passes, backend=backend, verify="structure")


def plain_losses(name: str) -> list[float]:
    model = toy(name).to(DEVICE).train()
    rule = torch.optim.AdamW(model.parameters(), lr=RULE.lr, weight_decay=0.0)
    return naive_losses(model, rule, map(placed, batches(name, STEPS)))


STAGES: dict[str, tuple[tuple[StepPass, ...], dict[str, Any]]] = {
    "0": ((ZeRO(0),), {}),
    "1": ((ZeRO(1),), {"accumulate": 2}),
    "2": ((Remat("layers"), ZeRO(2)), {}),
    "3": ((Remat("auto"), ZeRO(3, prefetch=1)), {"accumulate": 2}),
    "3, offload": ((ZeRO(3), Offload("optimizer")), {}),
    "3, in backward": ((ZeRO(3, prefetch=2),), {"optimizer_in_backward": True}),
    "3, head": ((ZeRO(3), ParallelHead()), {}),
    "3, compiled": ((Remat("auto"), ZeRO(3, prefetch=1)), {"torch_compile": True}),
}


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
@pytest.mark.parametrize("stage", STAGES)
def test_losses_of_plain_pytorch(name: str, stage: str, ranks: None) -> None:
    if "head" in stage and name == "bert":
        pytest.skip("ParallelHead is for heads without a bias")
    passes, options = STAGES[stage]
    trainer = trainer_of(moved(name), *passes, **options)
    found = [trainer.step(placed(batch)).loss for batch in batches(name, STEPS)]
    assert found == pytest.approx(plain_losses(name), rel=1e-5)
    if trainer.regions is not None:
        assert trainer.regions.places
        assert (trainer.regions.kept_apart, trainer.regions.failed) == ([], "")


def test_captured_on_the_device_and_proven_there() -> None:
    model = toy("llama").to(DEVICE)
    program = bg.capture(model, placed(labelled("llama", 3, 9)), prove="training")
    assert program.device.type == DEVICE
    trainer = trainer_of(program, LoRA(r=2), ZeRO(3))
    first = [trainer.step(placed(batch)).loss for batch in batches("llama", 3)]
    assert first[0] == pytest.approx(plain_losses("llama")[0], rel=1e-5)


def test_a_batch_of_the_host_is_moved_or_named() -> None:
    """Users' loaders give batches of the host."""
    trainer = trainer_of(moved("llama"))
    found = [trainer.step(batch).loss for batch in batches("llama", STEPS)]
    assert found == pytest.approx(plain_losses("llama"), rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumes_with_equal_bits(precision: str, tmp_path: Path, ranks: None) -> None:
    given = [placed(batch) for batch in batches("gpt2", STEPS)]
    trainer = trainer_of(moved("gpt2"), ZeRO(3), precision=precision)
    for batch in given[:4]:
        trainer.step(batch)
    trainer.save(tmp_path / "ckpt")
    after = [trainer.step(batch).loss for batch in given[4:]]
    other = trainer_of(moved("gpt2"), ZeRO(3), precision=precision)
    other.load(tmp_path / "ckpt")
    assert [other.step(batch).loss for batch in given[4:]] == after
    on_host = trainer_of(captured_to_train("gpt2"), precision=precision)
    on_host.load(tmp_path / "ckpt")
    wide = 1e-5 if precision == "fp32" else 2e-2
    assert [on_host.step(batch).loss for batch in batches("gpt2", STEPS)[4:]] == pytest.approx(
        after, rel=wide
    )


def test_fits_and_reports_the_memory_of_the_device(tmp_path: Path) -> None:
    trainer = trainer_of(moved("llama"), ZeRO(3), precision="bf16", clip_norm=1.0)
    trainer.fit(batches("llama", STEPS), steps=STEPS, save=tmp_path, save_every=4)
    again = trainer_of(moved("llama"), ZeRO(3), precision="bf16", clip_norm=1.0)
    again.fit(batches("llama", STEPS), steps=STEPS, save=tmp_path, resume="auto")
    assert again.steps == STEPS


@pytest.mark.parametrize("name", NAMES)
def test_programs_run_where_they_are_moved_to(name: str) -> None:
    program = captured(name)[1]
    there = program.to(DEVICE)
    for length in BY_NAME[name].lengths:
        batch = BY_NAME[name].example(2, length)
        found = there(**placed(batch))
        for key, value in program(**batch).items():
            assert found[key].device.type == DEVICE
            if value.is_floating_point():
                assert distance(found[key].cpu(), value) < 1e-4, key


@pytest.mark.parametrize(
    "made",
    [Quantize("int8", activations="none"), Quantize("int8"), Prune()],
    ids=["int8", "int8 both", "pruned"],
)
def test_passes_run_on_the_device(made: ModelPass) -> None:
    program = captured("llama")[1]
    batch = BY_NAME["llama"].example(2, 12)
    there = bg.compile(program.to(DEVICE), passes=[made], backend=Torch())(**placed(batch))
    on_host = bg.compile(program, passes=[made], backend=Torch())(**batch)
    for key, value in on_host.items():
        if value.is_floating_point():
            assert distance(there[key].float().cpu(), value.float()) < 2e-2, key


def test_generates_the_tokens_of_the_host() -> None:
    program = bg.capture(tiny_decoder(), tokens())
    prompts = [[3, 14, 15, 9, 26, 5], [35], [8, 9, 7]]
    expected = bg.compile(program, backend=Torch(generate=True)).generate(prompts, max_new_tokens=12)
    there = bg.compile(program.to(DEVICE), backend=Torch(generate=True)).generate(prompts, max_new_tokens=12)
    assert there == expected
