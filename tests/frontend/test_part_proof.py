"""A program whose weights are left in files is compared with its model by its first layers, and says what was not compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bmgraph as bg
from bmgraph.analysis.structure.layer_lists import cut_lists
from bmgraph.errors import CaptureError
from bmgraph.ir.program import Program
from bmgraph.serialize.weight_files import WEIGHTS
from bmgraph.utils.stored_tensor import is_too_large
from tests.helpers.training import labelled
from tests.helpers.zoo import BERT_LIKE, BY_NAME, _build

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = x + self.down(self.up(x).tanh())
        return found


class Model(nn.Module):
    """Layers of some widths between two linears."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        self.layers = nn.ModuleList(Layer(width) for width in widths)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        found: torch.Tensor = self.last(x)
        return found


class ByNumber(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for index in range(4):
            x = self.layers[index](x)
        found: torch.Tensor = self.last(x)
        return found


class Counting(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = super().forward(x) / len(self.layers)
        return found


class Collecting(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        total = torch.zeros_like(x)
        for layer in self.layers:
            x = layer(x)
            total = total + x
        found: torch.Tensor = self.last(total)
        return found


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program fits in memory, but its part does."""
    monkeypatch.setattr("bmgraph.frontend.weights_folder.memory_budget", lambda: 0)
    monkeypatch.setattr("bmgraph.frontend.part_proof.memory_budget", lambda: 10**9)


def captured(folder: Path, kind: type[Model], *widths: int, **options: Any) -> Program:
    torch.manual_seed(0)
    save_file(kind(*widths).state_dict(), folder / WEIGHTS)
    with torch.device("meta"):
        model = kind(*widths)
    return bg.capture(model, (X,), weights=folder, **options)


def test_the_first_layers_stand_for_all(tmp_path: Path, no_memory: None) -> None:
    program = captured(tmp_path, Model, 8, 16, 16, 8, 8, 8, prove="training")
    assert program.unproven == (
        "not compared with the model: layers.4 to layers.5, whose weights are left in files; they make the calls of earlier layers, which "
        "were compared",
    )
    assert program.backward == (
        "backward: equals the model's in 20 of 20 parameters that train, of the layers that are compared"
    )
    assert all(map(is_too_large, program.parameters.values()))
    part, cut = cut_lists(program, {"layers": 6})
    assert [(one.path, one.kept, one.count) for one in cut] == [("layers", 4, 6)]
    model = Model(8, 16, 16, 8)
    model.load_state_dict({name: tensor + 0 for name, tensor in part.parameters.items()})
    assert torch.equal(part(x=X)["output"], model(X).detach())
    assert len(program.graph.nodes) > len(part.graph.nodes)


def test_layers_that_cannot_be_cut_short(tmp_path: Path, no_memory: None) -> None:
    program = captured(tmp_path, Collecting, 8, 8, 8)
    assert cut_lists(program, {"layers": 3})[1] == ()
    assert program.unproven == ()  # nothing was left out


def test_a_model_that_takes_its_layers_by_number(tmp_path: Path, no_memory: None) -> None:
    program = captured(tmp_path, ByNumber, 8, 8, 8, 8)
    assert program.unproven == (
        "not compared with the model: cut to its first layers, it raises IndexError: index 2 is out of range",
    )


def test_a_difference_in_the_first_layers_is_an_error(tmp_path: Path, no_memory: None) -> None:
    with pytest.raises(
        CaptureError, match=r"differs from eager in output by .*cut to their first layers; if forward counts"
    ):
        captured(tmp_path, Counting, 8, 8, 8)


def test_a_part_that_is_too_large_is_not_compared(
    tmp_path: Path, no_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bmgraph.frontend.part_proof.memory_budget", lambda: 4000)
    program = captured(tmp_path, Model, 8, 8, 8)
    assert program.unproven == ("not compared with the model: its weights of 0.0 GB do not fit in memory",)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "left"), [("llama", 1), ("gpt2", 1), ("t5", 2), ("bert", 1)])
def test_architectures(tmp_path: Path, no_memory: None, name: str, left: int) -> None:
    from transformers import AutoConfig

    def make() -> Any:
        toy = (
            _build("BertForMaskedLM", "BertConfig", **BERT_LIKE) if name == "bert" else BY_NAME[name].build()
        )
        config = AutoConfig.for_model(**toy.config.to_dict())  # type: ignore[union-attr]
        config.num_hidden_layers = 5
        if name == "t5":
            config.num_decoder_layers = 5
        return type(toy)(config)

    make().save_pretrained(tmp_path)
    with torch.device("meta"):
        model = make()
    program = bg.capture(model, labelled(name, 3, 9), weights=tmp_path, prove="training")
    (line,) = program.unproven
    assert line.count(" to ") == left
    assert "of the layers that are compared" in program.backward
    assert not program.training
