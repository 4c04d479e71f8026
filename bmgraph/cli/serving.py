"""`bmgraph serve`: its options, as the server takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bmgraph.cli.console import CleanConsole
from bmgraph.errors import InputError
from bmgraph.runtime.generation.batching.options import Batching
from bmgraph.serving.options import ServeOptions
from bmgraph.serving.run import serve

UNITS = {"GB": 10**9, "MB": 10**6, "KB": 10**3, "GIB": 2**30, "MIB": 2**20, "KIB": 2**10, "B": 1}


def serve_bundle(
    bundle: Path,
    limits: Mapping[str, Any],
    allowed: Mapping[str, Any],
    deltas: Sequence[str],
    console: CleanConsole,
    **options: Any,
) -> None:
    """Serve a bundle until a signal; `deltas` are texts NAME=FOLDER. Raises InputError for options that are not valid."""
    batching = Batching(
        rows=limits["rows"],
        waiting=limits["waiting"],
        prefill=limits["prefill"],
        wide=limits["wide"],
        cache_bytes=size_of(limits["cache"]),
        prefix_bytes=0 if limits["prefixes"].strip() == "0" else size_of(limits["prefixes"]),
    )
    for name, lowest in (("longest_body", 1), ("seconds", 0), ("most_tokens", 1)):
        if allowed[name] is not None and not allowed[name] > lowest - 1:
            raise InputError(f"{name.replace('_', ' ')}: {allowed[name]} is too small")
    serve(
        bundle, ServeOptions(**allowed), deltas=_folders(deltas), batching=batching,
        told=lambda line: console.print(line, soft_wrap=True), **options,
    )  # fmt: skip


def size_of(text: str) -> int | None:
    """A number of bytes such as 2GB or 512MiB; None for "". Raises InputError for another text.

    Example:
        >>> size_of("1.5MB")
        1500000
    """
    if not text:
        return None
    unit = next((unit for unit in UNITS if text.upper().endswith(unit)), "")
    number = text[: len(text) - len(unit)].strip()
    try:
        found = int(float(number) * UNITS.get(unit, 1))
    except (ValueError, OverflowError):
        found = 0
    if found < 1:
        raise InputError(f"{text!r} is no size: give one such as 2GB or 512MiB")
    return found


def _folders(deltas: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in deltas:
        name, sign, folder = text.partition("=")
        if not (name and sign and folder):
            raise InputError(f"--delta {text!r}: give NAME=FOLDER")
        if name in found:
            raise InputError(f"--delta names {name!r} twice")
        found[name] = Path(folder)
    return found
