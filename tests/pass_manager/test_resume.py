"""Passes that are stopped and go on: to bit-equal programs, from whole files of the same work alone, one process at a time."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import bmgraph as bg
from bmgraph.api import Pass, Program
from bmgraph.errors import InputError, PassError, ResourceError
from bmgraph.pass_manager import resume_folder
from bmgraph.passes import (
    Distill,
    Fit,
    KVCache,
    LoRA,
    MoEfy,
    Prune,
    Quantize,
    Relufy,
    Shrink,
    Smooth,
    SplitOutliers,
)
from bmgraph.serialize.kept_values import read_values, write_values
from tests.helpers.captured import batches, captured
from tests.helpers.processes import fresh_processes
from tests.helpers.resumed import (
    Stopped,
    assert_same,
    is_stopped,
    run_and_save,
    stopping,
    two_layers,
    two_layers_batches,
)
from tests.helpers.zoo import BY_NAME

GPTQ = Quantize("int4", method="gptq", group=16, site_drift=9.0)
PASSES = (GPTQ, LoRA(r=2, targets="all-linear"))


def run(folder: Path | None, passes: Sequence[Pass] = PASSES, **given: Any) -> Program:
    options: dict[str, Any] = {"calibration": two_layers_batches(), "max_drift": 9.0, **given}
    return bg.Pipeline(passes).run(two_layers(), resume=folder, **options)


def test_goes_on_from_wherever_it_was_stopped(tmp_path: Path) -> None:
    plain, folder = run(None), tmp_path / "work"
    assert_same(run(folder), plain)
    assert not folder.exists()
    again: list[int] = []
    while is_stopped(run, folder, len(again)):
        with stopping(99) as kept:
            assert_same(run(folder), plain)
        assert not folder.exists()
        again.append(len(kept))
    assert again == [*range(len(again), 0, -1)]  # what was kept is not kept, or found, once more


def test_a_pass_that_finished_is_not_run_again(tmp_path: Path) -> None:
    told: list[str] = []

    class Told:
        def after(self, item: Pass, *others: object) -> None:
            told.append(item.name)

    assert is_stopped(run, tmp_path, 4)
    assert [item.name for item in tmp_path.iterdir()].count("pass-000.safetensors") == 1
    bg.Pipeline(PASSES, [Told()]).run(
        two_layers(), calibration=two_layers_batches(), max_drift=9.0, resume=tmp_path
    )
    assert told == ["lora"]


def test_what_a_failing_pass_leaves_is_taken_up(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="fits no site"):
        run(tmp_path, (GPTQ, Prune("2:4", include=("none",))))
    assert (tmp_path / "pass-000.safetensors").exists()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"passes": (GPTQ, LoRA(r=4, targets="all-linear"))}, "passes was"),
        ({"max_drift": 8.0}, "max_drift was 9.0, and is 8.0 now"),
        ({"calibration": two_layers_batches(seed=5)}, "first calibration batch differs"),
        ({"calibration": two_layers_batches(2)}, "'calibration' holds other data"),
        ({"resources": {"more": 1}}, "resources was calibration, and is calibration, more now"),
    ],
)
def test_other_work_is_refused(tmp_path: Path, other: dict[str, Any], said: str) -> None:
    assert is_stopped(run, tmp_path, 3)
    before = sorted(item.name for item in tmp_path.iterdir())
    with pytest.raises(InputError, match="holds unfinished work of another run.*" + said):
        run(tmp_path, **{"passes": PASSES, **other})
    assert sorted(item.name for item in tmp_path.iterdir()) == before
    assert_same(run(tmp_path), run(None))


def test_other_weights_threads_and_versions_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_stopped(run, tmp_path, 3)
    program = two_layers().clone()
    name = next(name for name, tensor in program.parameters.items() if tensor.dim() == 2)
    program.parameters[name] = program.parameters[name] * 2
    program.shared = {}
    with pytest.raises(InputError, match="the weights differs"):
        bg.Pipeline(PASSES).run(program, calibration=two_layers_batches(), max_drift=9.0, resume=tmp_path)
    machine = resumed_machine()
    for key in ("threads", "torch"):
        monkeypatch.setattr(
            "bmgraph.pass_manager.resumed_passes.machine", lambda key=key: {**machine, key: "7"}
        )
        with pytest.raises(InputError, match=f"{key} was .*, and is 7 now"):
            run(tmp_path)


def resumed_machine() -> dict[str, str]:
    from bmgraph.ir.pass_record import machine

    return machine()


def test_files_of_a_resource_that_changed_are_refused(tmp_path: Path) -> None:
    folder, text = tmp_path / "work", tmp_path / "delta"
    run(None, [LoRA(r=2, targets="all-linear")]).save_delta(str(text))
    from bmgraph.passes import LoadDelta

    passes = [LoadDelta("delta"), GPTQ]

    def load(where: Path | None) -> Program:
        return run(where, passes, resources={"delta": str(text)})

    plain = load(None)
    assert is_stopped(load, folder, 2)
    assert (folder / "pass-000.safetensors").exists()
    shutil.copytree(folder, tmp_path / "copy")
    assert_same(load(folder), plain)
    file = next(text.glob("*.json"))
    file.write_text(file.read_text() + " ")
    with pytest.raises(InputError, match="'delta' holds other data"):
        load(tmp_path / "copy")


@pytest.mark.parametrize(
    ("how", "stop"), [("cut", 3), ("changed", 3), ("changed", 4), ("empty", 3), ("link", 4)]
)
def test_damaged_files_are_computed_again(tmp_path: Path, how: str, stop: int) -> None:
    folder = tmp_path / "work"
    assert is_stopped(run, folder, stop)
    files = [item for item in folder.iterdir() if item.name != "work.safetensors"]
    for file in files:
        data = file.read_bytes()
        if how == "link":
            (tmp_path / file.name).write_bytes(data)
            file.unlink()
            file.symlink_to(tmp_path / file.name)
        else:
            middle = len(data) * 2 // 3
            changed = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
            file.write_bytes({"cut": data[:middle], "changed": changed, "empty": b""}[how])
    with pytest.warns(UserWarning, match="computed again"):
        found = run(folder)
    assert_same(found, run(None))
    assert not folder.exists()


def test_a_folder_whose_description_is_damaged_begins_anew(tmp_path: Path) -> None:
    assert is_stopped(run, tmp_path, 4)
    (tmp_path / "work.safetensors").write_bytes(b"{}")
    with pytest.warns(UserWarning, match="computed again"), stopping(99) as kept:
        assert_same(run(tmp_path), run(None))
    assert kept[0] == "work.safetensors"


def test_a_folder_with_other_contents_is_refused_and_left(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"other contents \(mine.txt\)"):
        run(tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(ResourceError, match="cannot be a folder"):
        run(tmp_path / "mine.txt" / "work")
    with pytest.raises(InputError, match="give the path of a folder"):
        bg.Pipeline(PASSES).run(two_layers(), resume=3)  # type: ignore[arg-type]


def test_a_full_disk_stops_with_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, count = resume_folder.write_values, 0

    def full(file: Path, value: object) -> int:
        nonlocal count
        count += 1
        if count == 4:
            monkeypatch.setattr("bmgraph.serialize.kept_values.stream_tensors", no_room)
        return write(file, value)

    def no_room(*given: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(resume_folder, "write_values", full)
        with pytest.raises(ResourceError, match=r"the disk is full.*what was kept before stays"):
            run(tmp_path)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 3
    assert_same(run(tmp_path), run(None))


def test_one_process_at_a_time_and_a_killed_one_leaves_it(tmp_path: Path) -> None:
    folder, out = tmp_path / "work", tmp_path / "out"
    process = fresh_processes().Process(target=run_and_save, args=(folder, out, PASSES, 3))
    process.start()
    while not (folder / "held").exists() and process.is_alive():
        time.sleep(0.01)
    with pytest.raises(InputError, match="another process works in"):
        run(folder)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (folder / "held").unlink()
    with stopping(99) as kept:
        assert_same(run(folder), run(None))
    assert len(kept) == 2  # of the second layer on


@pytest.mark.parametrize("backends", [(), pytest.param(("auto",), marks=pytest.mark.slow)])
def test_engines_are_built_of_what_was_kept_and_the_report_tells(
    tmp_path: Path, backends: Sequence[str]
) -> None:
    def compiled(folder: Path | None, backend: str) -> Any:
        return bg.compile(
            two_layers(),
            [GPTQ],
            backend=backend,
            calibration=two_layers_batches(),
            max_drift=9.0,
            resume=folder,
        )

    for backend in ("torch", *backends):
        place = tmp_path / backend
        with pytest.raises(Stopped), stopping(3):
            compiled(place, backend)
        engine = compiled(place, backend)
        assert not place.exists()
        said = " ".join(engine.report.notes)
        assert f"went on from {place}: " in said
        assert "MB of finished work at most, and is removed" in said
        plain = compiled(None, engine.report.backend or "torch")
        assert engine.report.weights == plain.report.weights


def test_several_ranks_are_told_to_compress_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bmgraph.distributed.process_group import Ranks

    monkeypatch.setattr(Ranks, "here", lambda: Ranks(0, 2))
    with pytest.raises(InputError, match="resume= is for one process, and these are 2 ranks"):
        run(tmp_path / "work")


def test_values_come_back_as_they_were(tmp_path: Path) -> None:
    turned = torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1)
    value = {
        "a": (1, 2.5, None, True, "x\n\u2028é"),
        ("k", 2): [float("inf"), -0.0, {}],
        3: {
            "t": turned,
            "h": torch.ones(3, dtype=torch.bfloat16),
            "s": torch.tensor(2),
            "e": torch.ones(2, 0),
        },
    }
    write_values(tmp_path / "file", value)
    found = read_values(tmp_path / "file")
    assert found["a"] == value["a"]
    assert str(found["k", 2]) == str(value["k", 2])
    assert torch.equal(found[3]["t"], turned)
    assert found[3]["t"].stride() == turned.stride()
    for name in ("h", "s", "e"):
        assert torch.equal(found[3][name], value[3][name])  # type: ignore[index]
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


Q: dict[str, Any] = {"group": 16, "site_drift": 9.0}
FIT = (
    "shrink{ffn=0.25}",
    "quantize{scheme=int4,method=gptq,group=16,site_drift=9.0}",
    "quantize{scheme=int8}",
)
SWEEP: dict[str, tuple[str, list[Pass]]] = {
    "awq": ("llama", [Quantize("int4", method="awq", **Q)]),
    "quantease": ("llama", [Quantize("int3", method="quantease", **Q)]),
    "zero points": ("llama", [Quantize("int4", method="gptq", symmetric=False, **Q)]),
    "mixed": ("llama", [Quantize("mixed", average=4.5, site_drift=9.0)]),
    "mixed by gptq": ("llama", [Quantize("mixed", method="gptq", average=4.5, site_drift=9.0)]),
    "sparsegpt": ("llama", [Prune("2:4", score="sparsegpt"), Quantize("int8")]),
    "wanda": ("bert", [Prune("2:4", score="wanda"), Quantize("int8")]),
    "static": (
        "bert",
        [Quantize("int8", activations="static", ranges="entropy", smooth=True, correct_bias=True)],
    ),
    "outliers": ("bert", [SplitOutliers(), Quantize("int8")]),
    "shrink": ("bert", [Shrink(ffn=0.25, score="activation"), Quantize("int8")]),
    "layers": ("bert", [Shrink(layers=0.5), Quantize("int4", method="gptq", **Q)]),
    "moefy": ("bert", [MoEfy(experts=4, active=2)]),
    "moefy within": ("bert", [MoEfy(experts=4, active="auto", average=2.0, split="coactivation")]),
    "distill": (
        "bert",
        [Shrink(ffn=0.25), Distill(steps=2, on="outputs"), Quantize("int4", method="awq", **Q)],
    ),
    "relufy": ("bert", [Relufy(data="text", steps=2), MoEfy(experts=4, active=2)]),
    "fit": ("bert", [Fit(bytes="170KB", over=FIT)]),
    "cache": ("llama", [Quantize("int4", method="gptq", **Q), KVCache()]),
    "[in, out]": ("gpt2", [Smooth(), Quantize("int4", method="gptq", **Q)]),
    "encoder-decoder": ("t5", [Quantize("int4", method="gptq", **Q), Prune("2:4")]),
    "experts": ("mixtral", [Quantize("int4", method="gptq", **Q)]),
    "packed": (
        "phi3",
        [Prune("2:4", score="wanda", transposable=True), Quantize("int8")],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SWEEP)
def test_every_calibrated_pass_goes_on_from_every_stop(name: str, tmp_path: Path) -> None:
    architecture, passes = SWEEP[name]
    _, program = captured(architecture)
    data, folder = batches(BY_NAME[architecture]), tmp_path / "work"

    def go(where: Path | None) -> Program:
        return bg.Pipeline(passes).run(
            program,
            calibration=data,
            resources={"teacher": program, "text": data},
            max_drift=9.0,
            resume=where,
        )

    plain, stops = go(None), 0
    while is_stopped(go, folder, stops):
        if stops % 3 == 2:
            is_stopped(go, folder, 1)  # and once more after that
        assert_same(go(folder), plain)
        assert not folder.exists()
        stops += 1
    assert stops > len(passes)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_process_killed_at_any_time_goes_on(seed: int, tmp_path: Path) -> None:
    pick, folder, out = random.Random(seed), tmp_path / "work", tmp_path / "out"
    plain, kills, started = run(None), 0, tmp_path / "started"
    for attempt in range(100):  # the first are killed at once, later ones farther on
        process = fresh_processes().Process(target=run_and_save, args=(folder, out, PASSES, None))
        process.start()
        while process.is_alive() and not started.exists():
            time.sleep(0.001)
        started.unlink(missing_ok=True)
        process.join(pick.uniform(0.0, 0.02 * (attempt + 1)))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        if out.exists():
            break
    found = bg.load(str(out))
    assert_same(found, plain)
    assert kills
