"""Engines by torch.compile: what the program gives, at all kinds of sizes, with packed weights, codes and deltas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import Torch
from bmgraph.errors import BackendError
from bmgraph.passes import Deltas, LoRA, Quantize, Stream
from bmgraph.runtime.torch.engine import TorchEngine
from bmgraph.verify.metrics import relative_error
from tests.helpers.deltas import trained
from tests.helpers.models import tiny_decoder, tiny_encoder, tokens


class Scores(nn.Module):
    """A feed-forward whose weight is read twice, and a score for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.inner(torch.tanh(self.inner(values))).mean(1)


def feeds(*sizes: int) -> dict[str, torch.Tensor]:
    return {"values": torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)))}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Scores().eval()


@pytest.fixture(scope="module")
def engine(model: nn.Module) -> TorchEngine:
    return bg.compile(model, [], example=feeds(3, 5, 8), backend=Torch(torch_compile=True))


def test_it_gives_what_the_model_gives_at_sizes_above_one(model: nn.Module, engine: TorchEngine) -> None:
    for sizes in ((3, 5, 8), (2, 9, 8), (4, 4, 8)):
        found = engine(**feeds(*sizes))["output"]
        assert relative_error(found, model(**feeds(*sizes)).detach()) < 1e-6
    assert engine.report.notes == [
        f"torch.compile: weights are packed, a copy of up to {72 * 4 / 1e6:,.1f} MB beside the program's"
    ]


def test_where_it_cannot_compile_it_says_so_when_it_is_built_and_later_runs_as_it_is(
    model: nn.Module, engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(module: nn.Module, **options: object) -> Any:
        def fails(*values: torch.Tensor) -> None:
            raise RuntimeError("no C++ compiler\nand a page of it")

        return fails

    monkeypatch.setattr(torch, "compile", none)
    with pytest.raises(BackendError, match=r"torch.compile fails, so leave it out: no C\+\+ compiler$"):
        bg.compile(model, [], example=feeds(3, 5, 8), backend=Torch(torch_compile=True))
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler"):
        found = engine(**feeds(1, 1, 8))["output"]
    assert torch.equal(found, engine.program(**feeds(1, 1, 8))["output"])
    assert torch.equal(found, engine(**feeds(1, 1, 8))["output"])  # and says it once


@pytest.mark.parametrize("other", ["stream", "devices"])
def test_what_runs_call_by_call_excludes_it(model: nn.Module, other: str) -> None:
    passes = [Stream("1MB")] if other == "stream" else []
    devices = ("cpu", "cpu") if other == "devices" else ()
    with pytest.raises(BackendError, match="leave one of the two out"):
        bg.compile(model, passes, example=feeds(3, 5, 8), backend=Torch(torch_compile=True, devices=devices))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("length", [1, 7])
def test_one_row_and_one_token_have_forms_of_their_own(rows: int, length: int) -> None:
    model = tiny_encoder()
    engine = bg.compile(model, [], example=tokens(), backend=Torch(torch_compile=True))
    batch = tokens(rows, length)
    assert relative_error(engine(**batch)["logits"], engine.program(**batch)["logits"]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("passes", [[], [Quantize("int4", group=16)]])
def test_it_generates_the_ids_of_the_program(passes: list[Quantize]) -> None:
    model, prompts = tiny_decoder(), [[3, 4, 5], [7], [9, 2, 6, 8, 1]]
    engines = [
        bg.compile(model, passes, example=tokens(), backend=Torch(generate=True, torch_compile=compiled))
        for compiled in (False, True)
    ]
    assert ("codes stay codes" in engines[1].report.notes[-1]) is bool(passes)
    for given in (prompts, prompts[:1]):
        plain, compiled = (engine.generate(given, max_new_tokens=9) for engine in engines)
        assert plain == compiled
    requests = [engines[1].submit(prompt, max_new_tokens=9) for prompt in prompts]
    alone = [engines[0].generate([prompt], max_new_tokens=9)[0] for prompt in prompts]
    assert [list(request.result().ids) for request in requests] == alone


@pytest.mark.slow
def test_deltas_are_exchanged_while_it_runs(
    model: nn.Module, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plain = bg.capture(model, feeds(3, 5, 8))
    folders, expected = {}, {}
    for seed, name in enumerate(("one", "two")):
        program = trained(bg.Pipeline([LoRA(r=2, targets=("inner",))]).run(plain), seed=seed, size=0.5)
        folders[name] = str(tmp_path_factory.mktemp("deltas") / name)
        program.save_delta(folders[name])
        expected[name] = program(**feeds(3, 5, 8))["output"]
    passes = [Deltas(("one",), capacity=2)]
    engine = bg.compile(plain, passes, backend=Torch(torch_compile=True), resources=folders)
    assert "deltas change" in engine.report.notes[-1]
    assert relative_error(engine(**feeds(3, 5, 8), delta="one")["output"], expected["one"]) < 1e-5
    engine.deltas.add("two", folders["two"])
    assert relative_error(engine(**feeds(3, 5, 8), delta="two")["output"], expected["two"]) < 1e-5
    engine.deltas.swap("one", folders["two"])
    assert relative_error(engine(**feeds(3, 5, 8), delta="one")["output"], expected["two"]) < 1e-5
