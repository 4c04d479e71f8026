"""Selects sites by patterns over module paths: globs, or regular expressions after `re:`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from bmgraph.analysis.weight_sites import site_path
from bmgraph.errors import PassError

REGEX = "re:"
"""Begins a pattern that is a regular expression, which must match a whole module path or name: `re:.*\\.(q|v)_proj`."""


def fits(name: str, pattern: str) -> bool:
    """Whether a pattern matches the whole of a name. Raises PassError for a regular expression that is not valid."""
    if not pattern.startswith(REGEX):
        return fnmatchcase(name, pattern)
    try:
        return re.fullmatch(pattern.removeprefix(REGEX), name) is not None
    except re.error as error:
        raise PassError(f"{pattern!r} is not a valid regular expression: {error}") from error


def matches(site: str, patterns: Sequence[str]) -> bool:
    """Whether a site's module path, its name, or the name of the parameter that it is a part of matches a pattern."""
    names = (site, site_path(site), site.partition("[")[0])
    return any(fits(name, pattern) for name in names for pattern in patterns)


def check_patterns(patterns: Iterable[str], sites: Sequence[str], option: str) -> None:
    """Raise PassError for a pattern that matches no site; the message names `option` and the closest module paths."""
    for pattern in patterns:
        if not _matched(pattern, sites):
            near = nearest(pattern, [site_path(site) for site in sites])
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise PassError(f"{option}={pattern!r} fits no site{hint}")


def resolve_patterns(patterns: Iterable[str], sites: Sequence[str], option: str) -> tuple[str, ...]:
    """The patterns for `matches`, such that each matches a site.

    A pattern that fits no whole module path is replaced by the sites that it means: those whose path has it
    between dots, at the end (`q_proj`), or as a module that holds the site (`layers.0`, `mlp`). Raises PassError where
    there are none, as `check_patterns` does.
    """
    found: list[str] = []
    for pattern in patterns:
        meant = [site for site in sites if _is_within(site, pattern)]
        if _matched(pattern, sites) or not meant:
            check_patterns([pattern], sites, option)
            meant = [pattern]
        found += meant
    return tuple(found)


def means(site: str, pattern: str) -> bool:
    """Whether a pattern fits the whole path of a site, its end, or a module that holds it."""
    return matches(site, (pattern,)) or _is_within(site, pattern)


def _is_within(site: str, pattern: str) -> bool:
    return not pattern.startswith(REGEX) and fnmatchcase(f".{site_path(site)}.", f"*.{pattern}.*")


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
