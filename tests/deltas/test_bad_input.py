"""What goes wrong with deltas is told in one line that says what, where and what to do: the table in docs/from_opendelta.md."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import BmgraphError
from bmgraph.ir.program import Program
from bmgraph.passes import Adapter, LoadDelta, LoRA, Merge
from bmgraph.serialize.opened import open_user_file
from bmgraph.serialize.safetensors_io import read_tensors, write_tensors
from tests.helpers.peft_models import stirred

CONFIG, TENSORS, START = "adapter_config.json", "adapter_model.safetensors", "base_model.model.blocks.0.q"


@pytest.fixture(scope="module")
def folder(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("delta") / "d"
    stirred(bg.Pipeline([LoRA(r=2)]).run(program, verify="off")).save_delta(str(place))
    return place


def load(program: Program, folder: Path) -> None:
    bg.Pipeline([LoadDelta("d")]).run(program, resources={"d": folder}, verify="off")


def of_peft(folder: Path) -> None:
    """Make it a folder without checksums, as PEFT writes it."""
    (folder / "manifest.json").unlink()


def config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        of_peft(folder)
        text = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**text, **changes}))

    return change


def renamed(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        of_peft(folder)
        found = {
            name: value.clone() for name, value in read_tensors(open_user_file(folder / TENSORS)).items()
        }
        write_tensors(folder / TENSORS, {name.replace(old, new): value for name, value in found.items()})

    return change


def cut_of_peft(folder: Path) -> None:
    of_peft(folder)
    cut(folder)


def cut(folder: Path) -> None:
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[: len(data) // 2])


FOLDERS: list[tuple[Callable[[Path], None], str]] = [
    (cut, r"adapter_model\.safetensors.*(damaged|altered|checksum|size)"),
    (cut_of_peft, r"adapter_model\.safetensors"),
    (config(peft_type="LOHA"), r"holds an adapter of type 'LOHA': only LORA, .* can be loaded"),
    (config(of_tomorrow=3), r"has of_tomorrow=3, an option that is not known here"),
    (
        config(r=3, lora_alpha=3),
        r"the factors of blocks\.0\.q have the rank 2, but its adapter_config\.json says 3",
    ),
    (renamed("lora_A", "lora_C"), r"holds 'base_model\.model\.blocks\.0\.q\.lora_C\.weight': expected"),
    (
        renamed("blocks.0.q", "blocks.0.qq"),
        r"changes 'blocks\.0\.qq', which is not a linear.*near it: blocks\.0\.q",
    ),
]


@pytest.mark.parametrize(("change", "message"), FOLDERS, ids=range(len(FOLDERS)))
def test_a_folder_that_is_wrong(
    change: Callable[[Path], None], message: str, program: Program, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "d")
    change(tmp_path / "d")
    with pytest.raises(BmgraphError, match=message):
        load(program, tmp_path / "d")


def test_a_model_that_it_does_not_fit(program: Program, folder: Path) -> None:
    other = program.clone()
    other.fingerprint = "2:" + "00" * 32
    with pytest.raises(
        BmgraphError, match=r"was trained on another backbone \(.*load it on the model that it was"
    ):
        load(other, folder)
    plain = bg.capture(nn.Sequential(nn.Linear(6, 4), nn.ReLU()), (torch.randn(2, 6),), prove=False)
    for passes, message in (
        ([LoRA()], r"the default choice, attention\.q and attention\.v, fits no role of the model"),
        ([LoRA(targets=("1",))], "targets='1' fits no site"),
        (
            [Adapter(2, targets=("0",)), Merge()],
            "pass merge requires delta, which nothing before it provides",
        ),
    ):
        with pytest.raises(BmgraphError, match=message):
            bg.Pipeline(passes).run(plain, verify="off")  # type: ignore[arg-type]
    with pytest.raises(BmgraphError, match=r"pass 'lora' has no option 'targetz'.*'targets'"):
        LoRA(targetz=("q",))  # type: ignore[call-arg]
