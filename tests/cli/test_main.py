"""The command line, as a user runs it: in a separate process, and its main function in this one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from bmgraph.cli.console import CleanConsole
from bmgraph.cli.main import main
from tests.helpers.hf_folders import SMALL, saved_folder
from tests.helpers.paths import ROOT

Call = Callable[..., "subprocess.CompletedProcess[str]"]


def call(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bmgraph", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "mine.py").write_text(
        "import torch\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))\n"
        "    return model, {'input': torch.randn(4, 32)}\n"
    )
    done = call(
        "compile",
        "mine:make",
        "--passes",
        "quantize{scheme=int8,activations=dynamic}",
        "--out",
        "out",
        "--resume",
        "work",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert "{activations=dynamic}" in done.stdout
    assert "work held 0.0 MB of finished work at most, and is removed" in " ".join(done.stdout.split())
    assert not (folder / "work").exists()
    return folder


@pytest.fixture
def here(saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Like `call`, but in this process, which saves the imports."""
    monkeypatch.chdir(saved)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.setattr("bmgraph.cli.main.console", CleanConsole())

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["bmgraph", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return subprocess.CompletedProcess(arguments, int(end.value.code or 0), *capsys.readouterr())

    return run


def test_run_inspect_and_bench_a_saved_engine(saved: Path, here: Call) -> None:
    assert "output: float32[4, 32]" in call("run", "out", cwd=saved).stdout
    assert "takes input: f32[batch, 32]" in here("inspect", "out").stdout
    done = here("bench", "out", "--runs", "2", "--out", "figures.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((saved / "figures.json").read_text())
    assert "made_by" in figures["contestants"]["out"]["profile_us"]


def test_an_openvino_engine_is_compiled_run_and_timed_beside_another(saved: Path, here: Call) -> None:
    if find_spec("openvino") is None:
        pytest.skip("OpenVINO is not installed")
    done = here("compile", "mine:make", "--backend", "openvino", "--out", "ov")
    assert done.returncode == 0, done.stderr
    assert "openvino engine" in done.stdout
    assert "output: float32[4, 32]" in here("run", "ov").stdout
    done = here("bench", "out", "ov", "--runs", "2", "--out", "figures.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((saved / "figures.json").read_text())
    assert figures["contestants"]["ov"]["profile_us"]["operator"]


def test_a_folder_of_images_is_read_by_its_config(here: Call, tmp_path: Path) -> None:
    config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    folder = saved_folder(
        tmp_path, "ViTForImageClassification", {**config, "image_size": 16, "patch_size": 8}
    )
    done = here("inspect", str(folder))
    assert "takes pixel_values: f32[batch, 3, 16, 16]" in done.stdout, done.stderr


def test_help_names_every_command_and_passes_are_listed(here: Call) -> None:
    text = call("--help").stdout
    for command in ("demo", "compile", "run", "inspect", "bench", "passes"):
        assert command in text
    assert "quantize" in here("passes").stdout


def test_a_user_error_ends_the_process_with_exit_code_2(saved: Path) -> None:
    check_told(call("run", "nowhere", cwd=saved), "nowhere is not a bundle")


def check_told(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compile", "nowhere", "--out", "x"), "'nowhere' is not a model"),
        (("compile", "mine:make", "--passes", "quantise", "--out", "x"), "did you mean 'quantize'"),
        (("compile", "mine:other", "--out", "x"), "has no function 'other'"),
        (("compile", "none:make", "--out", "x"), "no module 'none'"),
        (("compile", "mine:make", "--backend", "tpu", "--out", "x"), "no backend is called 'tpu'"),
    ],
)
def test_a_user_error_is_one_line_and_exit_code_2(
    saved: Path, here: Call, arguments: tuple[str, ...], message: str
) -> None:
    check_told(here(*arguments), message)
    assert not (saved / "x").exists()


def test_a_folder_generates_as_its_generation_config_says(here: Call, tmp_path: Path) -> None:
    config = {**SMALL, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    folder = saved_folder(tmp_path / "llama", "LlamaForCausalLM", config, tokenizer=True)
    (folder / "generation_config.json").write_text(
        '{"eos_token_id": [2, 3], "max_new_tokens": 3, "num_beams": 2}'
    )
    done = here("compile", str(folder), "--generate", "--length", "8", "--out", str(tmp_path / "engine"))
    assert done.returncode == 0, done.stderr
    assert "asks for num_beams=2" in done.stdout.replace("\n", " ")
    model: Any = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the museum opens", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, num_beams=1, do_sample=False)[0, ids.shape[1] :]
    done = here("generate", str(tmp_path / "engine"), "the museum opens", "at nine")
    assert done.stdout.splitlines()[0] == tokenizer.decode(expected, skip_special_tokens=True)
    single = here("generate", str(tmp_path / "engine"), "the museum opens")  # printed as it comes
    assert single.stdout == f"{tokenizer.decode(expected, skip_special_tokens=True)}\n"
    ahead = here("generate", str(tmp_path / "engine"), "the museum opens", "at nine", "--speculate")
    assert ahead.stdout == done.stdout or "gives a token other bits beside another one" in ahead.stderr
    check_told(
        here("compile", "mine:make", "--generate", "--backend", "tensorrt", "--out", "x"),
        "no output scores the vocabulary",
    )
