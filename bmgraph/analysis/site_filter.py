"""Choosing sites by name: globs over module paths."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from bmgraph.analysis.weight_sites import site_path
from bmgraph.errors import PassError


def matches(site: str, patterns: Sequence[str]) -> bool:
    """Whether a site's module path, or its parameter's name, fits one of the globs."""
    return any(fnmatchcase(site, pattern) or fnmatchcase(site_path(site), pattern) for pattern in patterns)


def check_patterns(patterns: Iterable[str], sites: Sequence[str], option: str) -> None:
    """Raise PassError for a glob that fits no site, with the nearest names."""
    for pattern in patterns:
        if pattern != "*" and not any(matches(site, (pattern,)) for site in sites):
            near = nearest(pattern, [site_path(site) for site in sites])
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise PassError(f"{option}={pattern!r} fits no site{hint}")


def nearest(pattern: str, paths: Sequence[str]) -> list[str]:
    """The module paths that a pattern may have meant: alike in their last part, else as a whole."""
    first: dict[str, str] = {}
    for path in paths:
        first.setdefault(path.rpartition(".")[2], path)
    tail = pattern.rpartition(".")[2].strip("*")
    alike = difflib.get_close_matches(tail, first, 2, 0.3)
    return [first[part] for part in alike] or difflib.get_close_matches(pattern.strip("*."), paths, 2, 0.3)
