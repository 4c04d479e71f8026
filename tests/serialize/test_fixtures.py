"""Folders saved by earlier code load and compute the same: `tests/fixtures/v1`, written on 2026-11-25."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import bmgraph as bg
from bmgraph.passes import LoadDelta
from tests.fixtures import write
from tests.helpers.models import tiny_encoder, tokens
from tests.helpers.paths import ROOT

FOLDER = ROOT / "tests" / "fixtures" / "v1"
EXACT = 2e-6
"""Tolerance for another machine's order of summation, relative to the largest output."""
ROUNDED = 2e-2
"""With quantized activations, the last bit of a value may cross a rounding step."""


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "expected.safetensors")


def read(expected: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {
        key.removeprefix(f"{name}/"): value for key, value in expected.items() if key.startswith(f"{name}/")
    }


def holds(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], within: float) -> None:
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        atol = within * float(value.double().abs().max())
        assert torch.allclose(found[key].double(), value.double(), rtol=0, atol=atol), key


def test_a_program(expected: dict[str, torch.Tensor]) -> None:
    program = bg.load(FOLDER / "program")
    assert [record.text for record in program.history if not record.within] == [
        "prune", "quantize{activations=none}", "lora{r=2,targets=[*q*,*v*]}"
    ]  # fmt: skip
    found = program(**read(expected, "program/in"))
    holds(found, read(expected, "program/out"), EXACT)
    assert {linear.role for linear in program.structure().linears} >= {"attention.q", "attention.o"}


def test_a_delta(expected: dict[str, torch.Tensor]) -> None:
    backbone = bg.capture(tiny_encoder(**write.SIZES), tokens(3, 6))
    program = bg.Pipeline([LoadDelta("delta")]).run(backbone, resources={"delta": str(FOLDER / "delta")})
    holds(program(**read(expected, "delta/in")), read(expected, "delta/out"), EXACT)


def test_an_engine(expected: dict[str, torch.Tensor]) -> None:
    engine = bg.load(FOLDER / "engine")
    found = engine(**read(expected, "engine/in"))
    holds(
        {key: torch.as_tensor(value) for key, value in found.items()}, read(expected, "engine/out"), ROUNDED
    )


def test_an_encoder_decoder(expected: dict[str, torch.Tensor]) -> None:
    program: Any = bg.load(FOLDER / "encoder_decoder")
    holds(program.at("encoder")(**read(expected, "encoder/in")), read(expected, "encoder/out"), EXACT)
    holds(program(**read(expected, "decoder/in")), read(expected, "decoder/out"), EXACT)


def test_an_encoder_decoder_generates() -> None:
    """Its files say neither what the cache is nor which input is the mask."""
    engine: Any = bg.compile(bg.load(FOLDER / "encoder_decoder"), backend="torch")
    kinds = [str(spec.kind) for spec in (*engine.program.inputs, *engine.program.at("encoder").inputs)]
    assert kinds == ["ids", "memory", "memory", "memory", "cache", "cache", "ids", "mask"]
    prompts = [[3, 4, 5, 6], [7, 8]]
    together = engine.generate(prompts, max_new_tokens=4, start=0)
    assert together == [engine.generate([prompt], max_new_tokens=4, start=0)[0] for prompt in prompts]


def test_a_checkpoint_of_two_ranks(expected: dict[str, torch.Tensor]) -> None:
    trainer = write.trainer(shared=False)
    with pytest.warns(UserWarning, match="does not say what it computed"):
        trainer.load(FOLDER / "checkpoint")
    losses = [trainer.step(tokens(4, 6, seed)).loss for seed in (2, 3)]
    wanted = read(expected, "checkpoint")
    assert losses == pytest.approx(wanted.pop("losses").tolist(), rel=1e-5)
    after = trainer.program().parameters
    for name, value in wanted.items():
        assert torch.allclose(after[name], value, rtol=0, atol=1e-4 * float(value.abs().max())), name
