"""Import rules: the order of packages, no import cycles, and imports that stay light."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

from tests.helpers.paths import ROOT, library_modules

ORDER = (
    "errors", "utils", "ops", "ir", "analysis", "distributed", "lowering", "serialize", "training", "verify", "deltas",
    "prompting", "frontend", "pass_manager", "passes", "runtime", "benchmarking", "backends", "api", "pipeline", "loading", "replaying",
    "compiler", "runners", "planning", "serving", "cli",
)  # fmt: skip
"""Packages and root modules, bottom up: each imports only itself and those before it."""

ABOVE_PROGRAM = {
    "bmgraph.analysis.structure.finder",
    "bmgraph.deltas.module_tree",
    "bmgraph.deltas.peft_format",
    "bmgraph.frontend.hf_export",
    "bmgraph.ir.editor",
    "bmgraph.ir.eval_form",
    "bmgraph.ir.kept_module",
    "bmgraph.ir.printer",
    "bmgraph.ir.shape_inference",
    "bmgraph.serialize.program_bundle",
}
"""Late imports of `Program`'s convenience methods: structure, tree, save_delta, save_pretrained, edit, module, call, str, to, save."""

PROGRAM = "bmgraph.ir.program"


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path, types: bool = False) -> list[tuple[str, str]]:
    """(module, name) of every import in a file, also inside functions; those under TYPE_CHECKING only with `types`."""
    skipped = {
        id(inner)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
        if not types
    }
    found = []
    for node in ast.walk(tree(path)):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.module, alias.name) for alias in node.names]
    return found


def targets(path: Path, types: bool = False) -> set[str]:
    """The library's modules that a file imports."""
    named = {
        f"{module}.{name}" if f"{module}.{name}" in library_modules() else module
        for module, name in imports(path, types)
    }
    return named & set(library_modules())


def room(module: str) -> str:
    """The package or root module that a module belongs to."""
    return [*module.split("."), ""][1]


@pytest.mark.parametrize("module", library_modules())
def test_imports_go_one_way(module: str) -> None:
    path = library_modules()[module]
    if room(module) not in ("", "__main__"):
        for target in targets(path, types=True) - {"bmgraph"}:
            allowed = module == PROGRAM and target in ABOVE_PROGRAM | {"bmgraph.analysis.structure.sites"}
            assert allowed or ORDER.index(room(target)) <= ORDER.index(room(module)), (
                f"{module} imports {target}"
            )
    for target, _ in imports(path, types=True):
        assert not target.startswith("torch._") or path.name == "torch_internals.py", (
            f"{module} imports {target}"
        )


def test_every_package_stands_in_the_order() -> None:
    rooms = {room(module) for module in library_modules()} - {"", "__main__"}
    assert rooms == set(ORDER)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = nx.DiGraph()
    for module, path in library_modules().items():
        graph.add_edges_from((module, target) for target in targets(path) if target != module)
    graph.remove_edges_from([(PROGRAM, target) for target in ABOVE_PROGRAM])
    assert [sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1] == []


def test_the_root_is_small() -> None:
    assert len(list((ROOT / "bmgraph").glob("*.py"))) <= 10


def test_no_underscored_name_leaves_its_package() -> None:
    for module, path in library_modules().items():
        package = module.rsplit(".", 1)[0]
        for target, name in imports(path, types=True):
            private = name.startswith("_") and not name.startswith("__")
            assert not (private and target in library_modules() and target.rsplit(".", 1)[0] != package), (
                f"{module} imports {name} of {target}"
            )


def test_a_module_says_its_one_purpose() -> None:
    said: dict[tuple[str, str], str] = {}
    for module, path in library_modules().items():
        text = ast.get_docstring(tree(path))
        assert text, f"{module} has no docstring"
        key = (module.rsplit(".", 1)[0], text.splitlines()[0])
        assert key not in said, f"{module} says of itself what {said[key]} says"
        said[key] = module


def test_setup_lists_every_package() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packages = {module for module, path in library_modules().items() if path.name == "__init__.py"}
    assert set(setup["options"]["packages"].split()) == packages


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
    loaded = _loaded(
        "import bmgraph.runtime\nfrom bmgraph.runtime.ort.engine import OrtEngine\nfrom bmgraph import load"
    )
    heavy = ("bmgraph.passes", "bmgraph.backends", "bmgraph.frontend", "bmgraph.compiler")
    assert not {name for name in loaded if name.startswith(heavy)}
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
    for module, path in library_modules().items():
        if module == "bmgraph.cli.demo":
            continue  # the demo names the one trained model that it uses
        words = set(path.read_text().lower().replace("_", " ").replace("-", " ").replace(".", " ").split())
        assert not words & set(names), path
