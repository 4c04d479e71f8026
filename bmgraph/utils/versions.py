"""The versions of the libraries that a captured graph depends on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch


def versions() -> dict[str, str]:
    """The versions by package: torch, bmgraph and transformers ("none" where one is not installed)."""
    found = {"torch": str(torch.__version__)}
    for package in ("bmgraph", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found
