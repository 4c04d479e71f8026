"""A program or engine with a KV cache scores a plain batch, without a cache, as the model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import Onnx, Torch
from bmgraph.errors import InputError
from bmgraph.ir.program import Program
from bmgraph.passes import KVCache
from bmgraph.verify.metrics import relative_error
from tests.helpers.models import tiny_decoder, tokens


class Translator(nn.Module):
    """An encoder of one attention and a decoder of two, with a mask over the source."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target, self.head = nn.Embedding(11, 16), nn.Embedding(13, 16), nn.Linear(16, 13)
        self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, decoder_input_ids: torch.Tensor
    ) -> torch.Tensor:
        attend, hidden = nn.functional.scaled_dot_product_attention, attention_mask.bool()[:, None, None]
        memory = heads(self.source(input_ids))
        memory = memory + attend(memory, memory, memory, hidden)
        y = self.target(decoder_input_ids)
        x = heads(y)
        x = x + attend(x, heads(self.key(y)), heads(self.value(y)), is_causal=True)
        x = x + attend(x, memory, memory, hidden)
        logits: torch.Tensor = self.head(x.transpose(1, 2).flatten(2))
        return logits


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (2, 8)).transpose(1, 2)


@pytest.fixture(scope="module")
def decoder() -> Program:
    return bg.capture(tiny_decoder(), tokens())


@pytest.fixture(scope="module", params=["program", "torch", "onnx", "loaded"])
def scorer(request: pytest.FixtureRequest, decoder: Program, tmp_path_factory: pytest.TempPathFactory) -> Any:
    program = bg.Pipeline([KVCache()]).run(decoder)
    if request.param == "program":
        return program
    engine = bg.compile(
        program, backend=Torch(generate=True) if request.param == "torch" else Onnx(generate=True)
    )
    if request.param == "loaded":
        folder = tmp_path_factory.mktemp("scoring") / "engine"
        engine.save(folder)
        return bg.load(folder)
    return engine


def test_a_plain_batch_is_scored_as_by_the_model(scorer: Any, decoder: Program) -> None:
    batch = tokens(3, 9)
    for mask in (
        torch.ones(3, 9, dtype=torch.int64),
        torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] + [0] * 8]),
    ):
        expected = decoder(ids=batch["ids"], attention_mask=mask)["output"]
        found = scorer(ids=batch["ids"], attention_mask=mask)["output"]
        assert found.shape == expected.shape == (3, 9, 50)
        assert relative_error(found[mask.bool()], expected[mask.bool()]) < 1e-5


def test_chosen_positions_are_scored(scorer: Any, decoder: Program) -> None:
    batch = {"ids": tokens(3, 9)["ids"], "attention_mask": torch.ones(3, 9, dtype=torch.int64)}
    expected = decoder(**batch)["output"]
    found = scorer(**batch, scored_positions=torch.tensor([8, 2]))["output"]
    assert relative_error(found, expected[:, [8, 2]]) < 1e-5
    with pytest.raises(InputError, match="'scored_positions' holds 9: input 'ids' has positions 0 to 8"):
        scorer(**batch, scored_positions=torch.tensor([9]))
    with pytest.raises(InputError, match="'scored_positions' holds -1"):
        scorer(**batch, scored_positions=torch.tensor([-1]))


def test_a_part_of_a_cache_is_refused(scorer: Any) -> None:
    batch = {"ids": tokens(3, 9)["ids"], "attention_mask": torch.ones(3, 9, dtype=torch.int64)}
    with pytest.raises(InputError, match="missing input 'past_value_0'"):
        scorer(**batch, past_key_0=torch.zeros(3, 4, 0, 8))


@pytest.mark.parametrize("backend", [Torch(generate=True), Onnx(generate=True)], ids=["torch", "onnx"])
def test_an_encoder_runs_by_itself(backend: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Translator().eval()
    batch = {
        "input_ids": torch.randint(11, (3, 7)),
        "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1, 1] + [0] * 5]),
        "decoder_input_ids": torch.randint(13, (3, 5)),
    }
    engine = bg.compile(model, example=batch, backend=backend)
    assert set(engine.graphs) == {"encoder"}
    with torch.no_grad():
        assert relative_error(engine(**batch)["output"], model(**batch)) < 1e-5
    with pytest.raises(InputError, match="missing input 'attention_mask'"):
        engine(**{name: value for name, value in batch.items() if name != "attention_mask"})
