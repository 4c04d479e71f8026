"""Stream: engines within a limit of memory compute what the model computes, and keep the limit or say the smallest one."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bmgraph as bg
from bmgraph.backends import AdamW, Torch
from bmgraph.errors import BackendError, BundleError, InputError
from bmgraph.ir.program import Program
from bmgraph.passes import Quantize, Stream
from bmgraph.runtime.torch.engine import TorchEngine
from bmgraph.runtime.torch.stream.place import DevicePlace
from bmgraph.runtime.torch.stream.streamed_graph import StreamedGraph
from bmgraph.runtime.torch.stream.weight_files import files_of
from bmgraph.runtime.torch.stream.weight_memory import WeightMemory
from bmgraph.serialize.opened import OpenedFile
from bmgraph.utils.stored_tensor import is_too_large

WIDTH, ROWS = 128, 900
LIMIT = 22_000_000
"""16.8 MB of it are what kernels may take inside."""
SMALLEST = re.compile(r"needs at least ([\d,]+)")


class Model(nn.Module):
    """A table whose rows are the head's too, a large bias, and one weight read twice, far apart."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.wide = nn.Linear(WIDTH, 20_000)
        self.head = nn.Linear(WIDTH, ROWS, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.table(ids)
        for layer in (*self.layers, self.layers[0]):
            x = x + layer(x).relu()
        return {"scores": self.head(x), "sums": self.wide(x).sum(-1), "turned": x @ self.layers[1].weight.t()}


IDS = torch.arange(10).reshape(2, 5)


def _model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def _meta() -> Model:
    with torch.device("meta"):
        return Model().eval()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    state = {name: value for name, value in _model().state_dict().items() if name != "head.weight"}
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def program(original: Path) -> Program:
    return bg.capture(_meta(), (IDS,), weights=original)


def _streamed(program: Program, limit: int | str = LIMIT) -> TorchEngine:
    engine = bg.compile(program, [Stream(limit)], backend=Torch(), verify="off")
    assert isinstance(engine, TorchEngine)
    return engine


def _own_threads() -> list[str]:
    return [item.name for item in threading.enumerate() if item.name == "bmgraph-stream"]


def test_a_meta_model_and_its_folder_run_within_a_limit(original: Path) -> None:
    engine = bg.compile(_meta(), [Stream("22MB")], example=(IDS,), backend="torch", weights=original)
    assert isinstance(engine, TorchEngine)
    model, schedule = _model(), engine.schedule(ids=IDS)
    assert engine.report.engine_drift == 0
    for length in (1, 3, 12):
        ids = torch.randint(ROWS, (3, length), generator=torch.Generator().manual_seed(length))
        found = engine(ids=ids)
        with torch.no_grad():
            for name, expected in model(ids).items():
                torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-6)
        assert not _own_threads()
    parts = [use.unit.rows for use in schedule.reads if use.unit.name == "wide.weight"]
    assert len(parts) > 1
    assert sum(parts) == 20_000
    assert schedule.peak <= schedule.limit == LIMIT
    assert "predicted peak" in str(engine.report)
    assert not any(item.kept is not None for item in engine.program.parameters.values() if is_too_large(item))  # type: ignore[attr-defined]


def test_what_fits_is_read_once_and_stays(program: Program) -> None:
    engine = _streamed(program, "1GB")
    schedule = engine.schedule(ids=IDS)
    assert schedule.read == 0
    read = []
    for tensor in engine.program.parameters.values():
        fill = tensor.source.fill  # type: ignore[attr-defined]
        tensor.source.fill = lambda *given, fill=fill: (read.append(given[1]), fill(*given))  # type: ignore[attr-defined]
    engine(ids=IDS)
    first = len(read)
    assert first
    engine(ids=IDS[:, :1])
    assert len(read) - first == 2  # rows of the table that are looked up


def test_the_smallest_limit_that_an_error_names_is_enough(program: Program) -> None:
    with pytest.raises(BackendError, match="needs at least") as caught:
        _streamed(program, 2_000_000)
    found = SMALLEST.search(str(caught.value))
    assert found is not None
    least = int(found[1].replace(",", ""))
    engine = _streamed(program, least)
    torch.testing.assert_close(engine(ids=IDS), program(ids=IDS))
    with pytest.raises(BackendError, match="needs at least"):
        _streamed(program, least - 4096)
    with pytest.raises(InputError, match=r"a call with ids .*needs at least"):
        engine(ids=IDS.repeat(50, 1))


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_codes_are_read_as_codes(program: Program, bits: str) -> None:
    quantize = Quantize(bits, activations="none")
    small = bg.compile(program, [quantize], backend=Torch(), verify="off").program
    engine = _streamed(small, 24_000_000)
    torch.testing.assert_close(engine(ids=IDS), small(ids=IDS))
    reads = {use.unit.name: use.unit for use in engine.schedule(ids=IDS).reads}
    assert reads["wide.weight_codes"].bytes < WIDTH * 20_000 * 1.01
    assert "wide.weight" not in reads


def test_a_saved_program_keeps_its_limit(program: Program, tmp_path: Path) -> None:
    _streamed(program).save(tmp_path / "saved")
    loaded = bg.load(tmp_path / "saved")
    assert isinstance(loaded, Program)
    assert loaded.memory == LIMIT
    again = bg.compile(loaded, backend=Torch(), verify="off")
    assert again.schedule(ids=IDS).peak <= LIMIT
    torch.testing.assert_close(again(ids=IDS), program(ids=IDS))


def _cut(file: Path) -> None:
    with open(file, "r+b") as stream:
        stream.truncate(file.stat().st_size // 2)


def _overwritten(file: Path) -> None:
    with open(file, "r+b") as stream:
        stream.seek(-1000, 2)
        stream.write(b"x" * 100)


@pytest.mark.parametrize("damage", [_cut, _overwritten])
def test_a_file_that_is_damaged_is_one_error_and_no_thread_is_left(
    original: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "weights"))
    engine = _streamed(bg.capture(_meta(), (IDS,), weights=folder, prove=False))
    damage(folder / "model.safetensors")
    for _ in range(2):
        with pytest.raises(BundleError, match="altered"):
            engine(ids=IDS)
        assert not _own_threads()


def test_where_reads_past_the_page_cache_are_refused_they_go_through_it(
    original: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _streamed(program)(ids=IDS)
    monkeypatch.setattr("bmgraph.serialize.opened.open_direct", lambda _: "O_DIRECT is refused: for a test")
    engine = _streamed(bg.capture(_meta(), (IDS,), weights=original, prove=False))
    assert "through the system's page cache (O_DIRECT is refused: for a test)" in str(
        engine.schedule(ids=IDS)
    )
    found = engine(ids=IDS)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_system_is_told_only_of_what_it_reads_itself(
    original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read past the page cache would be read by the system a second time."""
    told: list[int] = []
    monkeypatch.setattr(OpenedFile, "will_read", lambda _, begin, end: told.append(end - begin))
    engine = _streamed(bg.capture(_meta(), (IDS,), weights=original, prove=False))
    schedule = engine.schedule(ids=IDS)
    engine(ids=IDS)
    if schedule.way == "past the system's page cache":
        assert told == [4 * WIDTH] * IDS.numel()  # the rows that are looked up
    told.clear()
    monkeypatch.setattr("bmgraph.serialize.opened.open_direct", lambda _: "O_DIRECT is refused: for a test")
    engine = _streamed(bg.capture(_meta(), (IDS,), weights=original, prove=False))
    engine(ids=IDS)
    assert sum(told) == schedule.read + 4 * WIDTH * IDS.numel()


def test_a_file_whose_name_is_gone_stays_open(original: Path, tmp_path: Path, program: Program) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "weights"))
    engine = _streamed(bg.capture(_meta(), (IDS,), weights=folder, prove=False))
    shutil.rmtree(folder)
    torch.testing.assert_close(engine(ids=IDS), program(ids=IDS))


def test_weights_that_are_copied_to_a_device_give_the_same(program: Program) -> None:
    """A device that is the host's memory: the way of copies without a GPU."""
    memory = WeightMemory(LIMIT, DevicePlace(torch.device("cpu")))
    graph = StreamedGraph(files_of(program), memory)
    for ids in (IDS, IDS[:1, :1], IDS):
        for found, expected in zip(graph(ids), program(ids=ids).values()):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    schedule = graph.schedule((tuple(IDS.shape),))
    assert "through the system's page cache to cpu" in str(schedule)
    assert 0 < schedule.block <= schedule.capacity - schedule.apart
    assert schedule.peak <= LIMIT


def test_threads_call_one_after_the_other(program: Program) -> None:
    engine, found = _streamed(program), []
    threads = [threading.Thread(target=lambda: found.append(engine(ids=IDS)["scores"])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(item, found[0]) for item in found)


def test_ids_outside_the_table_are_refused(program: Program) -> None:
    engine = _streamed(program)
    with pytest.raises((InputError, IndexError), match="0 to 899"):
        engine(ids=IDS + ROWS)
    assert not _own_threads()


@pytest.mark.parametrize("memory", ["much", "0MB", -5, "300"])
def test_what_is_no_size_is_refused(memory: str | int) -> None:
    with pytest.raises(InputError, match=r"Stream\(memory="):
        Stream(memory)


def test_what_keeps_no_limit_refuses_it(program: Program) -> None:
    with pytest.raises(BackendError, match="backend 'onnx'"):
        bg.compile(program, [Stream("1GB")], backend="onnx", verify="off")
    with pytest.raises(BackendError, match="a trainer"):
        bg.compile(
            program, [Stream("1GB")], backend=Torch(optimizer=AdamW(lr=1e-3), loss="sums"), verify="off"
        )
    with pytest.raises(InputError, match="no limit of memory"):
        bg.compile(program, backend=Torch(), verify="off").schedule(ids=IDS)
