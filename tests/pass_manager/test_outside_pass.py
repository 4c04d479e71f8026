"""A pass from another package (the one in docs/writing_passes.md) works like a built-in one, without any bmgraph edit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import bmgraph as bg
from bmgraph.errors import InputError
from tests.helpers.outside import MODEL, installed, run_python
from tests.helpers.pages import code_of, entry_points_of


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `pip install` leaves it: the module, and metadata that declares its entry point."""
    folder = tmp_path_factory.mktemp("site")
    return installed(
        folder, entry_points_of("writing_passes.md", "From outside of the package"),
        {"small_pass": code_of("writing_passes.md"), "toy": MODEL},
    )  # fmt: skip


def test_it_is_listed(site: Path) -> None:
    listed = run_python(site, "-m", "bmgraph", "passes").stdout
    row = next(line for line in listed.splitlines() if re.match(r"\W*small\b", line))
    assert "approximate" in row
    assert "share=0.1" in listed
    assert "least magnitude" in " ".join(listed.split())


def test_it_is_compiled_reported_saved_and_replayed(site: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    done = run_python(
        site, "-m", "bmgraph", "compile", "toy:model", "--passes", "small{share=0.25},quantize{activations=none}",
        "--out", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"small\{share=0\.25\}\W+2\W", done.stdout)
    code = (
        "import sys, toy, bmgraph as bg\n"
        "engine = bg.load(sys.argv[1])\n"
        "print(engine.report.records[0].text, engine.report.records[0].edits[0].what)\n"
        "print(sorted(bg.replay(sys.argv[1], toy.model()[0]).parameters))"
    )
    again = run_python(site, "-c", code, str(out))
    first, names = again.stdout.splitlines()
    assert first == "small{share=0.25} 25% of its weights are 0"
    assert "'0.weight_codes'" in names
    with pytest.raises(InputError, match="small"):  # its package is not installed in this process
        bg.replay(out, torch.nn.Linear(2, 2))


def test_its_contract_is_held(site: Path, tmp_path: Path) -> None:
    done = run_python(
        site, "-m", "bmgraph", "compile", "toy:model", "--passes", "quantize{activations=none},small", "--out",
        str(tmp_path / "engine"),
    )  # fmt: skip
    assert done.returncode == 2
    assert "small cannot run on a program that is quantized" in done.stderr
    assert "try this order: passes=[small, quantize{activations=none}]" in done.stderr


@pytest.mark.slow
def test_it_stands_in_the_matrix_of_pairs(site: Path) -> None:
    code = (
        "from pathlib import Path\nfrom tests.helpers.pairs import attempt, pairs, recipes\n"
        "(mine,) = [recipe for recipe in recipes() if recipe.name == 'Small']\n"
        "print(sum(mine in pair for pair in pairs()) == 2 * (len(recipes()) - 1))\n"
        "(lora,) = [recipe for recipe in recipes() if recipe.name == 'LoRA']\n"
        "print(attempt((mine, lora), 'bert', Path('.')).kind)"
    )
    done = run_python(site, "-c", code)
    assert done.stdout.split("\n")[:2] == ["True", "runs"], done.stderr
