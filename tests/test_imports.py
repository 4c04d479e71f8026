"""Who may import whom, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

FOLDERS = {"bmgraph": "core", "passes": "passes", "backends": "backends", "runtime": "runtime"}
MAY = {
    "core": {"core"},
    "passes": {"core", "passes"},
    "runtime": {"core", "runtime"},
    "backends": {"core", "passes", "runtime", "backends"},
}
SEES_ALL = {"compiler.py", "main.py", "demo.py", "__init__.py"}


def _files() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def _imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


def _layer(module: str) -> str | None:
    if not module.startswith("bmgraph"):
        return None
    part = [*module.split("."), ""][1]
    return part if part in ("passes", "backends", "runtime") else "core"


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    layer = FOLDERS[path.relative_to(ROOT).parts[0]]
    if layer == "core" and path.name in SEES_ALL:
        return
    for module in _imports(path):
        target = _layer(module)
        assert target is None or target in MAY[layer], f"{path} imports {module}"
        assert not module.startswith("torch._") or path.name == "torch_internals.py", (
            f"{path} imports {module}"
        )


def _loaded(code: str) -> set[str]:
    text = f"{code}\nimport sys\nprint('\\n'.join(sys.modules))"
    return set(
        subprocess.run(
            [sys.executable, "-c", text], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout.split()
    )


def test_importing_is_light() -> None:
    assert not _loaded("import bmgraph") & {"torch", "onnx", "onnxruntime", "transformers", "networkx"}


def test_a_serving_process_loads_no_pass_and_no_compiler() -> None:
    loaded = _loaded("import bmgraph.runtime\nfrom bmgraph.runtime.ort.engine import Engine")
    assert not {name for name in loaded if name.startswith(("bmgraph.passes", "bmgraph.backends"))}
    assert not loaded & {"transformers", "onnxruntime", "torch._inductor", "torch._dynamo", "onnxscript"}


def test_no_architecture_is_named_in_library_code() -> None:
    names = (
        "bert",
        "gpt",
        "llama",
        "t5",
        "mistral",
        "qwen",
        "whisper",
        "mamba",
        "falcon",
        "bloom",
        "vit",
        "roberta",
        "gemma",
    )
    for path in _files():
        if path.name == "demo.py":
            continue  # it names the one trained model that it shows
        words = set(path.read_text().lower().replace("_", " ").replace("-", " ").replace(".", " ").split())
        assert not words & set(names), path
