"""Weights of a folder go into the shards of ranks as they lie in the file: nothing else is read, and nothing is whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import bmgraph as bg
from bmgraph.backends import AdamW, Torch
from bmgraph.cli.console import CleanConsole
from bmgraph.cli.train import train
from bmgraph.errors import BundleError, InputError
from bmgraph.passes import LoRA, ZeRO
from bmgraph.runtime.training.trainer import Trainer
from bmgraph.serialize.opened import open_regular_file
from bmgraph.serialize.stored_file import FileTensor, stored_tensors
from bmgraph.serialize.weight_files import WEIGHTS
from bmgraph.training.placement import Place
from bmgraph.utils.digest import digest
from bmgraph.utils.stored_tensor import Source, StoredTensor, as_dtype, copy_elements, left_in_file
from tests.helpers.ranks import run_ranks

IDS = torch.arange(24).reshape(4, 6)
BATCH = {"ids": IDS, "labels": (IDS * 7) % 30}
BUDGETS = ("bmgraph.frontend.weights_folder.memory_budget", "bmgraph.frontend.part_proof.memory_budget")


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return found


class Model(nn.Module):
    """Equal layers between an embedding and a head, with a loss."""

    def __init__(self, layers: int = 3, width: int = 16) -> None:
        super().__init__()
        self.table = nn.Embedding(30, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.head = nn.Linear(width, 30, bias=False)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return {"loss": F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())}


def real() -> Model:
    torch.manual_seed(0)
    return Model()


def on_meta() -> Model:
    with torch.device("meta"):
        return Model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("weights")
    save_file(real().state_dict(), found / WEIGHTS)
    return found


class Reads:
    """Counts the bytes that are read of tensors in files: in parts (`filled`), and the tensors that are read whole."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.filled, self.whole = 0, 0
        fill, read = FileTensor.fill, Source.read

        def counted(
            source: FileTensor, into: memoryview, begin: int, pages: memoryview | None = None
        ) -> None:
            self.filled += len(into)
            fill(source, into, begin, pages)

        def seen(source: Source) -> torch.Tensor:
            self.whole += 1
            return read(source)

        monkeypatch.setattr(FileTensor, "fill", counted)
        monkeypatch.setattr(Source, "read", seen)


def stored(path: Path, tensor: torch.Tensor, digest: str = "") -> StoredTensor:
    save_file({"t": tensor}, path)
    return stored_tensors(open_regular_file(path), path, False, {"t": digest} if digest else None)["t"]


def trainer_of(model: nn.Module, precision: str = "fp32", **more: Any) -> Trainer:
    backend = Torch(optimizer=AdamW(lr=1e-2), precision=precision, clip_norm=1.0)
    passes = more.pop("passes", [ZeRO(3, prefetch=1)])
    return bg.compile(model, passes=passes, example=BATCH, backend=backend, **more)


def outcome(trainer: Trainer) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of three steps, and the trained program's parameters."""
    return [trainer.step(BATCH).loss for _ in range(3)], trainer.program().parameters


@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_a_rank_reads_its_part_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: torch.dtype
) -> None:
    torch.manual_seed(0)
    plain = {name: torch.randn(size, 7).to(wanted) for name, size in (("a", 11), ("b", 6))}
    lazy = {name: stored(tmp_path / name, tensor) for name, tensor in plain.items()}
    reads = Reads(monkeypatch)
    place = Place.pack(lazy.items(), 3)
    for rank in range(3):
        reads.filled = 0
        assert torch.equal(
            place.take(rank, lazy.__getitem__),
            Place.pack(plain.items(), 3).take(rank, plain.__getitem__),
        )
        assert reads.filled <= place.share * wanted.itemsize
    assert reads.whole == 0


def test_a_cast_is_made_where_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.randn(40, 33, generator=torch.Generator().manual_seed(0)).bfloat16()
    reads = Reads(monkeypatch)
    for module in ("utils.stored_tensor", "serialize.stored_file"):
        monkeypatch.setattr(f"bmgraph.{module}.BLOCK", 256)
    wide = as_dtype(stored(tmp_path / "t", plain), torch.float32)
    assert isinstance(wide, StoredTensor)
    assert digest(wide) == digest(plain.float())
    found = torch.empty(500)
    copy_elements(wide, 71, found)
    assert torch.equal(found, plain.float().flatten()[71:571])
    narrow = torch.empty(500, dtype=torch.float64)
    copy_elements(wide, 71, narrow)
    assert torch.equal(narrow, plain.double().flatten()[71:571])
    assert reads.whole == 0
    assert torch.equal(wide + 0, plain.float())
    assert wide.source.sample(8, 16) == plain.float().flatten()[2:4].numpy().tobytes()


def test_a_file_that_was_changed_is_not_trained(tmp_path: Path) -> None:
    plain = torch.randn(40, 33)
    late, digested = stored(tmp_path / "a", plain), stored(tmp_path / "b", plain, "0" * 64)
    with open(tmp_path / "a", "r+b") as stream:
        stream.seek(-8, 2)
        stream.write(b"12345678")
    for tensor in (late, digested):
        with pytest.raises(BundleError, match="was altered after it was checked"):
            copy_elements(tensor, 3, torch.empty(5))


def test_what_is_not_finite_is_not_trained(tmp_path: Path) -> None:
    plain = torch.ones(10)
    plain[7] = float("nan")
    lazy = {"t": stored(tmp_path / "a", plain)}
    place = Place.pack(lazy.items(), 2)
    place.take(0, lazy.__getitem__)
    with pytest.raises(InputError, match="parameter 't' holds NaN or infinity"):
        place.take(1, lazy.__getitem__)


def test_values_in_memory_are_let_go_unless_they_were_changed(tmp_path: Path) -> None:
    save_file({"t": torch.ones(9)}, tmp_path / "t")
    made = stored_tensors(open_regular_file(tmp_path / "t"), tmp_path / "t", True)["t"]
    assert made.sum() == 9
    assert made.kept is not None
    left = left_in_file(made)
    assert isinstance(left, StoredTensor)
    assert (left.kept, left.source.resident) == (None, False)
    made.add_(1)
    assert left_in_file(made) is made


def test_a_trainer_of_weights_in_files_is_the_trainer_of_weights_in_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = outcome(trainer_of(real()))
    for budget in BUDGETS:  # neither the program nor a part of it fits in memory
        monkeypatch.setattr(budget, lambda: 0)
    reads = Reads(monkeypatch)
    trainer = trainer_of(on_meta(), weights=folder)
    total = sum(tensor.nbytes for tensor in trainer.state.outline.parameters.values())
    assert (reads.whole, reads.filled) == (0, total)
    losses, parameters = outcome(trainer)
    assert losses == expected[0]
    for name, tensor in expected[1].items():
        assert torch.equal(parameters[name], tensor), name


def model_and_batch() -> tuple[Model, dict[str, torch.Tensor]]:
    """What `bmgraph train` gets of a function."""
    return on_meta(), BATCH


def given_batches() -> list[dict[str, torch.Tensor]]:
    """The data of a run."""
    return [BATCH] * 2


@pytest.mark.slow
def test_the_command_line_trains_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "model": f"{__name__}:model_and_batch", "data": f"{__name__}:given_batches", "weights": str(folder),
        "passes": "zero{stage=3}", "steps": 2, "metrics": str(tmp_path / "metrics"),
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    train(tmp_path / "config.json", CleanConsole())
    assert "2 steps, last loss" in capsys.readouterr().out


def test_weights_are_for_models_without_any(folder: Path) -> None:
    program = bg.capture(torch.nn.Linear(2, 2), (torch.zeros(3, 2),))
    with pytest.raises(InputError, match="weights= is for a model on the meta device"):
        bg.compile(program, backend="torch", weights=folder)


def _ways(folder: str) -> Iterator[tuple[str, Any]]:
    """What two ranks find with weights in memory and in files, by what they do."""
    for precision in ("fp32", "bf16"):
        expected = outcome(trainer_of(real(), precision))
        with pytest.MonkeyPatch.context() as patch:
            reads = Reads(patch)
            patch.setattr(BUDGETS[1], lambda: 0)
            trainer = trainer_of(on_meta(), precision, weights=folder)
            yield f"{precision} whole", reads.whole
            yield (
                f"{precision} share",
                reads.filled / sum(place.share * 4 for place in trainer.state.places.values()),
            )
        losses, parameters = outcome(trainer)
        same = all(torch.equal(parameters[name], tensor) for name, tensor in expected[1].items())
        yield f"{precision} equal", losses == expected[0] and same
    made = {}
    for way in ("memory", "files"):
        torch.manual_seed(1)
        given = {"weights": folder} if way == "files" else {}
        model = on_meta() if way == "files" else real()
        made[way] = trainer_of(model, passes=[LoRA(r=2, targets=("*.up",)), ZeRO(3)], **given)
    yield "frozen digests", made["memory"].state.digests == made["files"].state.digests
    losses = made["memory"].step(BATCH).loss
    made["memory"].save(Path(folder) / "checkpoint")
    made["files"].load(Path(folder) / "checkpoint")
    yield "resumed", made["files"].step(BATCH).loss == made["memory"].step(BATCH).loss != losses


def _on_ranks(rank: int, folder: str) -> dict[str, Any]:
    return dict(_ways(folder))


@pytest.mark.slow
def test_two_ranks_read_their_shards(folder: Path, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    for found in run_ranks(2, _on_ranks, str(tmp_path)):
        assert found.pop("fp32 share") <= 1
        assert found.pop("bf16 share") <= 2  # values and masters
        assert not found.pop("fp32 whole")
        assert not found.pop("bf16 whole")
        assert found == dict.fromkeys(found, True)


def _with_nan(rank: int, folder: str) -> str:
    with pytest.raises(Exception, match="NaN") as error:
        trainer_of(on_meta(), weights=folder)
    return str(error.value)


@pytest.mark.slow
def test_what_is_wrong_in_the_shard_of_one_rank_is_told_on_all(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["layers.1.down.bias"][-1] = float("inf")
    save_file(tensors, tmp_path / WEIGHTS)
    for text in run_ranks(2, _with_nan, str(tmp_path)):
        assert "parameter 'layers.1.down.bias' holds NaN or infinity" in text
