"""The root folder of the repository, the library's modules in it, and the code of its pages."""

from __future__ import annotations

import re
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


def code_of(page: str) -> list[str]:
    """The blocks of Python of a page of docs/."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.S | re.M)


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
