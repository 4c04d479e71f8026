"""Selects sites by glob patterns over module paths."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from bmgraph.analysis.weight_sites import site_path
from bmgraph.errors import PassError


def matches(site: str, patterns: Sequence[str]) -> bool:
    """Whether a site's module path, its name, or the name of the parameter that it is a part of matches one of the globs."""
    names = (site, site_path(site), site.partition("[")[0])
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def check_patterns(patterns: Iterable[str], sites: Sequence[str], option: str) -> None:
    """Raise PassError for a glob that matches no site; the message names `option` and the closest module paths."""
    for pattern in patterns:
        if not _matched(pattern, sites):
            near = nearest(pattern, [site_path(site) for site in sites])
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise PassError(f"{option}={pattern!r} fits no site{hint}")


def resolve_patterns(patterns: Iterable[str], sites: Sequence[str], option: str) -> tuple[str, ...]:
    """The patterns for `matches`, such that each matches a site.

    A pattern that is no glob of a whole module path is replaced by the sites that it means: those whose path has it
    between dots, at the end (`q_proj`), or as a module that holds the site (`layers.0`, `mlp`). Raises PassError where
    there are none, as `check_patterns` does.
    """
    found: list[str] = []
    for pattern in patterns:
        meant = [site for site in sites if fnmatchcase(f".{site_path(site)}.", f"*.{pattern}.*")]
        if _matched(pattern, sites) or not meant:
            check_patterns([pattern], sites, option)
            meant = [pattern]
        found += meant
    return tuple(found)


def _matched(pattern: str, sites: Sequence[str]) -> bool:
    return pattern == "*" or any(matches(site, (pattern,)) for site in sites)


def nearest(pattern: str, paths: Sequence[str]) -> list[str]:
    """Module paths that a pattern may have meant: similar in the last component, else as a whole."""
    by_last: dict[str, str] = {}
    for path in paths:
        by_last.setdefault(path.rpartition(".")[2], path)
    tail = pattern.rpartition(".")[2].strip("*")
    similar = difflib.get_close_matches(tail, by_last, 2, 0.3)
    return [by_last[last] for last in similar] or difflib.get_close_matches(
        pattern.strip("*."), paths, 2, 0.3
    )
