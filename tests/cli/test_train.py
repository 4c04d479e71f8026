"""`bmgraph train`: a configuration is checked before anything is read, then trained, resumed, and run on ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bmgraph.backends import SGD, AdamW, Cosine
from bmgraph.cli.console import CleanConsole
from bmgraph.cli.train import train
from bmgraph.cli.train_config import read_config
from bmgraph.errors import InputError
from tests.helpers.hf_folders import SMALL, saved_folder
from tests.helpers.paths import ROOT

TEXT = "\n\n".join(["the museum opens at nine", "how do i do", "in the morning and at nine"] * 4) + "\n"
CONFIG: dict[str, Any] = {
    "model": "model", "data": {"train": "train.txt", "valid": "valid.jsonl", "length": 12, "rows": 2},
    "optimizer": {"name": "adamw", "lr": "3e-3"}, "schedule": {"name": "cosine", "warmup": 1, "steps": 6},
    "steps": 3, "save": "ckpt", "save_every": 2, "resume": "auto", "keep": 1, "clip_norm": 1,
}  # fmt: skip


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("train")
    saved_folder(made / "model", "LlamaForCausalLM", SMALL, tokenizer=True)
    (made / "train.txt").write_text(TEXT)
    (made / "valid.jsonl").write_text(
        "".join(json.dumps({"text": line}) + "\n" for line in TEXT.split("\n\n")[:3])
    )
    return made


def test_a_folder_is_trained_on_texts_and_resumed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    train(write(folder, CONFIG), CleanConsole())
    found = capsys.readouterr().out
    assert "3 steps, last loss" in found
    assert "perplexity" in found
    train(write(folder, {**CONFIG, "steps": 5, "passes": ""}), CleanConsole())
    assert "5 steps" in capsys.readouterr().out
    lines = [json.loads(line) for line in (folder / "ckpt" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[0]["rate"] == 3e-3
    assert lines[-1]["eval"]["perplexity"] > 1
    assert sorted(path.name for path in (folder / "ckpt").glob("step-*")) == ["step-00000005"]


def test_yaml_and_toml_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "model: m\ndata: texts.txt\nsteps: 10\naccumulate: 2\npasses: zero{stage=2}\n"
        "optimizer: {name: SGD, lr: 1e-2, no_decay: [head]}\nschedule: {name: cosine, steps: 10}\n"
    )
    (tmp_path / "a.toml").write_text(
        'model = "m"\ndata = "texts.txt"\nsteps = 10\naccumulate = 2\npasses = "zero{stage=2}"\n'
        '[optimizer]\nname = "sgd"\nlr = 0.01\nno_decay = ["head"]\n[schedule]\nname = "cosine"\nsteps = 10\n'
    )
    found = [read_config(tmp_path / f"a.{kind}") for kind in ("yaml", "toml")]
    assert found[0] == found[1]
    assert found[0].backend.optimizer == SGD(lr=0.01, no_decay=("head",))
    assert found[0].backend.schedule == Cosine(steps=10)
    (tmp_path / "b.json").write_text('{"model": "m", "data": "t", "steps": 1}')
    assert read_config(tmp_path / "b.json").backend.optimizer == AdamW()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 3}, "unknown key 'step'; did you mean 'steps'?"),
        ({"clipnorm": 3}, "unknown key 'clipnorm'; did you mean 'clip_norm'?"),
        ({"data": {"train": "a", "lenght": 3}}, "data: unknown key 'lenght'; did you mean 'length'?"),
        ({"optimizer": {"name": "adamv"}}, "optimizer: no name 'adamv'; did you mean 'adamw'?"),
        ({"optimizer": {"name": "sgd", "beta": 1}}, "optimizer: unknown key 'beta'"),
        ({"steps": "many"}, "steps is 'many': give a whole number"),
        ({"clip_norm": "big"}, "clip_norm is 'big': give a number or None"),
        (
            {"schedule": {"name": "linear", "steps": 2, "warmup": 2}},
            "steps=2: give more than the 2 of warmup",
        ),
        ({"precision": "fp8"}, "precision='fp8': choose one of"),
        ({"data": {}}, "data lacks 'train'"),
        ({"model": None}, "model is None: give a text"),
        ({"weights": "folder"}, "weights is for a model that a function makes"),
    ],
)
def test_what_is_not_valid_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        read_config(write(tmp_path, {**CONFIG, **change}))


def test_files_that_are_none(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.yaml").write_text("a: [1")
    for name, message in (("bad.yaml", "cannot read .*bad.yaml"), ("none.yaml", "there is no regular file")):
        with pytest.raises(InputError, match=message):
            read_config(tmp_path / name)
    monkeypatch.chdir(folder)
    (folder / "other.jsonl").write_text('{"words": "a b"}\n')
    for data, message in (
        ("none.txt", "there is no regular file none.txt: give one, or module:function"),
        ("other.jsonl", "other.jsonl, line 1 holds no text 'text'"),
    ):
        with pytest.raises(InputError, match=message):
            train(write(tmp_path, {**CONFIG, "data": data}), CleanConsole())


@pytest.mark.slow
def test_torchrun(folder: Path, tmp_path: Path) -> None:
    config = {**CONFIG, "passes": "zero{stage=3}", "save": str(tmp_path / "ckpt")}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29617",
    ]
    done = subprocess.run(
        [*command, "-m", "bmgraph", "train", str(write(folder, config))],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 steps, last loss") == 1
