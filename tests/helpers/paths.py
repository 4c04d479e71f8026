"""The root folder of the repository and the library's modules in it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]

FOLDERS = {
    "bmgraph": "bmgraph",
    "passes": "bmgraph.passes",
    "backends": "bmgraph.backends",
    "runtime": "bmgraph.runtime",
}
"""Top-level folder -> the package name that it is installed as."""


@cache
def library_modules() -> dict[str, Path]:
    """Every module of the library by its dotted name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = path
    return found
