"""Documentation holds: code in pages and docstrings runs, links lead somewhere, files and names that it gives exist."""

from __future__ import annotations

import doctest
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bmgraph.api
from tests.helpers.hf_folders import tiny_tokenizer
from tests.helpers.paths import FOLDERS, ROOT, library_modules

PAGES = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md")),
]

EXAMPLES = [name for name, path in library_modules().items() if ">>> " in path.read_text()]


def test_the_pass_of_the_page_passes_its_own_tests(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "writing_passes.md").read_text(), re.S)
    assert len(blocks) == 3
    (tmp_path / "test_small.py").write_text("\n".join(blocks))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(tmp_path / "test_small.py"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout
    assert "5 passed" in done.stdout


@pytest.mark.slow
def test_the_code_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    def ids(rows: int, length: int) -> dict[str, torch.Tensor]:
        found = torch.randint(5, 15, (rows, length))
        return {"input_ids": found, "attention_mask": torch.ones_like(found)}

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 15,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    first, second = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    batches = [ids(3, 7), ids(2, 9)]
    names: dict[str, object] = {
        "model": BertModel(BertConfig(**sizes)), "example": batches[0], "batch": batches[0], "batches": batches,
    }  # fmt: skip
    exec(first, names)
    labelled = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    names |= {
        "model": LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64, pad_token_id=0, eos_token_id=1)),
        "batch": labelled[0], "batches": labelled, "tokenizer": tiny_tokenizer(),
        "question": "a b", "message": "c", "text": "a b c", "loader": labelled, "valid": labelled, "steps": 4,
    }  # fmt: skip
    train, serve = second.split("\n\nengine = ")
    exec(train, names)
    shutil.copytree("trec", "spam")
    exec(f"engine = {serve}", names)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_in_docstrings_run(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_files_that_pages_name_exist(page: str) -> None:
    """In backticks: a path from the root or within a package, or a bare name of a file that some folder has."""
    folders = (*FOLDERS, "tests", "docs", "benchmarks", "examples")
    files = [f"/{path.relative_to(ROOT)}" for folder in folders for path in (ROOT / folder).rglob("*.py")]
    named = re.findall(r"`([\w/]+\.py)`", (ROOT / page).read_text())
    assert [name for name in named if not any(file.endswith(f"/{name}") for file in files)] == []


def test_the_docstring_of_the_api_names_all_of_it() -> None:
    text, errors = str(bmgraph.api.__doc__), "the errors it raises"
    assert errors in text
    left = [name for name in bmgraph.api.__all__ if f"`{name}`" not in text and not name.endswith("Error")]
    assert left == []
    assert [name for name in re.findall(r"`(\w+)`", text) if name not in bmgraph.api.__all__] == []
