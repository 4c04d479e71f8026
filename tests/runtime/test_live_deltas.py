"""Deltas on a running engine: added, removed and swapped, whole for every call, on torch and on ONNX Runtime."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import Torch
from bmgraph.errors import BmgraphError, BundleError, InputError, MisplacedError, PassError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.pass_base import ModelPass
from bmgraph.passes import IA3, Adapter, Deltas, LoadDelta, LoRA, Shrink
from bmgraph.runtime.delta_slots import Slots
from bmgraph.verify.metrics import relative_error
from tests.helpers.deltas import trained

BATCH = {"input": torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))}


@pytest.fixture(scope="module")
def plain() -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    return bg.capture(model, {"input": torch.randn(4, 5, 8)})


@pytest.fixture(scope="module")
def folders(plain: Program, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of deltas: three LoRAs of other ranks and linears, one that is too large, one of another family."""
    kinds: dict[str, ModelPass] = {
        "one": LoRA(r=4, targets=("0", "2")), "two": LoRA(r=2, targets=("0",), alpha=3), "three": LoRA(r=1, targets=("2",)),
        "large": LoRA(r=5, targets=("0",)), "scales": IA3(targets=("0",)), "adapter": Adapter(2, targets=("2",)),
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("deltas")
    for seed, (name, item) in enumerate(kinds.items()):
        trained(bg.Pipeline([item]).run(plain), seed=seed, size=0.5).save_delta(str(folder / name))
    return {name: str(folder / name) for name in kinds}


@pytest.fixture(scope="module")
def outputs(plain: Program, folders: dict[str, str]) -> dict[str | None, torch.Tensor]:
    """What the program gives with each LoRA alone, and with none."""
    found: dict[str | None, torch.Tensor] = {None: plain(**BATCH)["output"]}
    for name in ("one", "two", "three"):
        found[name] = bg.Pipeline([LoadDelta(name)]).run(plain, resources=folders)(**BATCH)["output"]
    return found


@pytest.fixture(scope="module", params=["torch", "onnx"])
def engine(request: pytest.FixtureRequest, plain: Program, folders: dict[str, str]) -> Any:
    if request.param == "onnx":
        pytest.importorskip("onnxruntime")
    return bg.compile(plain, [Deltas(("one",), capacity=2)], backend=request.param, resources=folders)


def check(engine: Any, outputs: dict[str | None, torch.Tensor], names: dict[str, str | None]) -> None:
    """Rows that choose each name, and none, must be those of the deltas that the names stand for."""
    rows = [*names, None, *names][:4]
    rows += [None] * (4 - len(rows))
    found = engine(**BATCH, delta=rows)["output"]
    for index, name in enumerate(rows):
        expected = outputs[names[name] if name else None][index]
        assert relative_error(found[index], expected) < 1e-4
    for name in (*names, None):  # one choice for all rows
        expected = outputs[names[name] if name else None]
        assert relative_error(engine(**BATCH, delta=name)["output"], expected) < 1e-4


def test_deltas_come_and_go(
    engine: Any,
    plain: Program,
    outputs: dict[str | None, torch.Tensor],
    folders: dict[str, str],
    tmp_path: Path,
) -> None:
    session = getattr(engine, "session", None)
    assert list(engine.deltas) == ["one"]
    assert "1 of 2 deltas: one; tables of" in repr(engine.deltas)
    check(engine, outputs, {"one": "one"})
    engine.deltas.add("b", folders["two"])
    check(engine, outputs, {"one": "one", "b": "two"})
    assert engine.deltas.capacity == len(engine.deltas) == 2
    assert "{one, b}" in engine.signature()
    with pytest.raises(InputError, match=r"all 2 entries are taken \(one, b\): remove a delta, or compile"):
        engine.deltas.add("c", folders["three"])
    engine.deltas.swap("one", folders["three"])
    check(engine, outputs, {"one": "three", "b": "two"})
    engine.save(tmp_path / "saved")
    check(_engine(bg.load(tmp_path / "saved")), outputs, {"one": "three", "b": "two"})
    engine.deltas.remove("b")
    check(engine, outputs, {"one": "three"})
    if hasattr(engine, "program"):
        found = engine.program(**BATCH, delta="one")["output"]
        assert relative_error(found, outputs["three"]) < 1e-5
    with pytest.raises(InputError, match=r"'delta' names 'b' \(names: one, or None"):
        engine(**BATCH, delta=["b"] * 4)
    with pytest.raises(InputError, match="'delta' holds 2, which no delta has"):
        engine(**BATCH, delta=torch.tensor([0, 1, 2, 0]))
    with pytest.raises(InputError, match="no delta is called 'b' "):
        engine.deltas.remove("b")
    engine.save(tmp_path / "saved")
    with pytest.raises(
        BmgraphError, match=r"were exchanged while its engine ran|the replayed weights differ"
    ):
        bg.replay(tmp_path / "saved", plain, resources=folders)
    again = _engine(bg.load(tmp_path / "saved"))
    again.deltas.add("b", folders["two"])
    check(again, outputs, {"one": "three", "b": "two"})
    engine.deltas.swap("one", folders["one"])
    check(engine, outputs, {"one": "one"})
    assert getattr(engine, "session", None) is session


def _engine(loaded: Any) -> Any:
    return bg.compile(loaded, backend="torch") if isinstance(loaded, Program) else loaded


def test_what_the_tables_cannot_hold_is_refused(
    engine: Any, plain: Program, folders: dict[str, str], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    other = bg.capture(nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)), plain.example)
    bg.Pipeline([LoRA(r=2, targets=("0",))]).run(other).save_delta(str(tmp_path / "other"))
    for folder, error, message in (
        (
            folders["large"],
            PassError,
            r"rank 5 at 0, and the tables have room for 4: compile with Deltas\(rank=5\)",
        ),
        (folders["scales"], PassError, "is of the family 'ia3', and the tables hold lora"),
        (tmp_path / "other", MisplacedError, "was trained on another backbone"),
        (tmp_path / "none", BundleError, "is not an adapter"),
    ):
        with pytest.raises(error, match=message):
            engine.deltas.add("new", folder)
    with pytest.raises(InputError, match=r"a delta 'one' already: swap\('one', folder\)"):
        engine.deltas.add("one", folders["two"])
    with pytest.raises(InputError, match="no delta is called 'on'; did you mean 'one'"):
        engine.deltas.swap("on", folders["two"])
    assert list(engine.deltas) == ["one"]


def test_linears_and_families_without_a_table_are_refused(plain: Program, folders: dict[str, str]) -> None:
    engine = bg.compile(plain, [Deltas(("two",), capacity=2)], backend=Torch(), resources=folders)
    with pytest.raises(MisplacedError, match=r"changes '2' \(a\), for which the tables have no place"):
        engine.deltas.add("three", folders["three"])
    with pytest.raises(InputError, match="this engine has no deltas that can be exchanged"):
        _ = bg.compile(plain, backend=Torch()).deltas
    small = bg.compile(
        plain, [Deltas(("one",), capacity=2), Shrink(ffn=0.25)], backend=Torch(), resources=folders
    )
    with pytest.raises(MisplacedError, match="was trained on another backbone"):
        small.deltas.add("two", folders["two"])


def test_room_for_ranks_and_types(
    plain: Program, folders: dict[str, str], outputs: dict[str | None, torch.Tensor]
) -> None:
    engine = bg.compile(
        plain, [Deltas(("two",), capacity=3, rank=6, dtype="fp16")], backend=Torch(), resources=folders
    )
    engine.deltas.add("large", folders["large"])
    assert {table.shape[0] for table in engine.deltas.tensors.values()} == {4}
    assert engine.deltas.bytes == 4 * 2 * 6 * (8 + 12)
    assert relative_error(engine(**BATCH, delta="two")["output"], outputs["two"]) < 1e-2
    for options, error, message in (
        ({"capacity": 0}, InputError, "capacity=0: give a number from 1"),
        ({"dtype": "int8"}, InputError, "dtype='int8': choose one of fp32, fp16"),
        ({"rank": 1}, PassError, "0.weight has a delta of rank 2: rank=1 must be at least that"),
    ):
        with pytest.raises(error, match=message):
            bg.Pipeline([Deltas(("two",), **options)]).run(plain, resources=folders)  # type: ignore[arg-type]


def test_a_call_reads_what_its_names_stood_for() -> None:
    """Entries that calls hold are not written: a change takes a free one, waits for the last, or says that it cannot."""
    table = ["", "old", ""]  # by number

    def write(text: str) -> Any:
        return lambda number: table.__setitem__(number, text)

    slots = Slots(["a", ""], wait=0.0)
    first = slots.hold(lambda names: [names.index("a") + 1])
    slots.put("a", write("new"), instead=True)
    second = slots.hold(lambda names: [names.index("a") + 1])
    assert [table[hold.numbers[0]] for hold in (first, second)] == ["old", "new"]
    for name, instead in (("a", True), ("b", False)):
        with pytest.raises(InputError, match=f"read every entry that '{name}' could be put into"):
            slots.put(name, write("newer"), instead)
    first.release()
    first.release()
    slots.put("b", write("other"))
    assert slots.names == ("b", "a")
    with pytest.raises(InputError, match="read every entry that 'a' could be put into"):
        slots.put("a", write("newer"), instead=True)
    del second  # nobody has it any more
    slots.put("a", write("newer"), instead=True)
    assert table == ["", "other", "newer"]

    def fails(number: int) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        slots.put("a", fails, instead=True)
    assert slots.names == ("b", "")  # what is half written has no name


def test_a_full_table_waits_for_its_readers() -> None:
    slots, began, done = Slots(["a"], wait=600), threading.Event(), list[str]()
    hold = slots.hold(lambda names: [1])

    def swap() -> None:
        slots.put("a", lambda number: done.append("written"), instead=True)

    def read() -> None:
        began.set()
        with slots.hold(lambda names: [names.index("a") + 1]):
            done.append("read")

    writer = threading.Thread(target=swap)
    writer.start()
    while not slots._rewritten:
        pass
    reader = threading.Thread(target=read)
    reader.start()
    began.wait()
    assert done == []
    hold.release()
    writer.join()
    reader.join()
    assert done == ["written", "read"]
