"""Documentation holds: code in pages and docstrings runs, links lead somewhere, files and names that it gives exist."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bmgraph.api
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
    assert len(blocks) == 2
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
    assert "4 passed" in done.stdout


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
