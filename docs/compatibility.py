"""Tries every ordered pair of passes on four toy architectures and writes compatibility.md: `python -m docs.compatibility`.

It takes hours and may be stopped at any time: what was found is kept in `build/pairs.json`, and a second run goes on from
there. Results of other code are found again, unless `--keep` is given.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bmgraph.ir.pass_record import machine
from tests.helpers.pairs import (
    ARCHITECTURES,
    EXCLUDED,
    FLOAT_BOUND,
    INTEGER_BOUND,
    MENDED,
    MISSING,
    RUNS,
    UNFIT,
    WRONG,
    attempt,
    pairs,
    recipes,
    untried,
)

ROOT = Path(__file__).parent.parent
PAGE = Path(__file__).parent / "compatibility.md"
KEPT = ROOT / "build" / "pairs.json"

SIGNS = {RUNS: "yes", MENDED: "order", MISSING: "needs", EXCLUDED: "never", UNFIT: "", WRONG: "WRONG"}

HEAD = f"""# Which passes go together

Every ordered pair of passes, tried on toy models of {len(ARCHITECTURES)} architectures ({", ".join(ARCHITECTURES)}).
Written by `python -m docs.compatibility`; `tests/passes/test_pairs.py` holds some of it in every run of the tests.

A pair runs (**yes**) when both passes pass their checks and the ONNX engine (the trainer's loss, where a pass of the step
stage is in it) agrees with the program on torch: within {FLOAT_BOUND:g} (relative L2), {INTEGER_BOUND:g} with 8-bit integers (the
median of three batches: a sum whose last bit falls on the other side of a rounding step moves one by up to a step). Deltas
are given values between the passes, as training would. **order**: refused, with another order in the
message, which was then tried and runs. **needs**: refused, with the pass named that has to come first. **never**: refused,
since no order of the two is valid. Empty: one of the two does not apply to the architecture by itself. ?: not tried yet.
"""


def code_digest() -> str:
    """A fingerprint of the code that results depend on."""
    state = hashlib.sha256()
    files = [
        path
        for folder in ("bmgraph", "passes", "backends", "runtime")
        for path in (ROOT / folder).rglob("*.py")
    ]
    for path in sorted(
        [*files, ROOT / "tests" / "helpers" / "pairs.py", ROOT / "tests" / "helpers" / "zoo.py"]
    ):
        state.update(path.read_bytes())
    return state.hexdigest()[:12]


def find_all(architectures: Iterable[str], names: Sequence[str], keep: bool, limit: float) -> dict[str, Any]:
    """The outcome of every pair, by "architecture | first | second"; stops after `limit` seconds.

    With `names` only pairs are tried in which one of these passes is.
    """
    found = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    begin, code = time.monotonic(), code_digest()
    folder = KEPT.parent / "pairs"
    folder.mkdir(parents=True, exist_ok=True)
    for architecture in architectures:
        for first, second in pairs():
            if names and not {first.name, second.name} & set(names):
                continue
            key = f"{architecture} | {first.name} | {second.name}"
            if time.monotonic() - begin > limit:
                return found
            if key in found and (keep or found[key]["code"] == code):
                continue
            outcome = attempt((first, second), architecture, folder)
            told = outcome.text.replace(f"{folder}{os.sep}", "")
            found[key] = {**outcome.as_json(), "text": told, "code": code}
            print(f"{key}: {outcome.kind} {outcome.text[:160]}", flush=True)
            _keep(found)
    return found


def _keep(found: dict[str, Any]) -> None:
    aside = KEPT.with_suffix(".part")
    aside.write_text(json.dumps(found, indent=1))
    os.replace(aside, KEPT)


def page(found: dict[str, Any]) -> str:
    """The whole page."""
    counts = Counter(item["kind"] for item in found.values())
    able = sum(counts[kind] for kind in (RUNS, MENDED, EXCLUDED, WRONG))
    share = counts[RUNS] / able if able else 0.0
    code = code_digest()
    stale = sum(item["code"] != code for item in found.values())
    lines = [
        HEAD,
        f"{len(found)} pairs: " + ", ".join(f"{counts[kind]} {kind}" for kind in SIGNS if counts[kind]) + ". "
        f"Of those without a missing pass, where both apply, {share:.0%} run as given."
        + (f" {stale} were found with earlier code." if stale else ""),
        *(f"Not tried, for want of a row in `tests/helpers/pairs.py`: {name}." for name in untried()),
        "",
        *(line for architecture in ARCHITECTURES for line in _table(architecture, found)),
        "## Refusals",
        "",
        "What is said, and on which architectures. Disagree? A pass says what it requires, provides and conflicts with in its",
        "class; open an issue with the row.",
        "",
        "| first | second | outcome | architectures | what is said |",
        "|---|---|---|---|---|",
        *_refusals(found),
        "",
        f"Made on {machine()['processor']}, torch {machine()['torch']}.",
    ]
    return "\n".join(lines) + "\n"


def _table(architecture: str, found: dict[str, Any]) -> list[str]:
    names = [recipe.name for recipe in recipes()]
    head = f"| first \\ second | {' | '.join(names)} |"
    rows = [
        f"| **{one}** | {' | '.join(_cell(found, architecture, one, other) for other in names)} |"
        for one in names
    ]
    return [f"## {architecture}", "", head, "|---" * (len(names) + 1) + "|", *rows, ""]


def _cell(found: dict[str, Any], architecture: str, first: str, second: str) -> str:
    item = found.get(f"{architecture} | {first} | {second}")
    return SIGNS[item["kind"]] if item else "?" if _is_pair(first, second) else "-"


def _is_pair(first: str, second: str) -> bool:
    return any((a.name, b.name) == (first, second) for a, b in pairs())


def _refusals(found: dict[str, Any]) -> list[str]:
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for key, item in found.items():
        if item["kind"] == RUNS:
            continue
        architecture, first, second = key.split(" | ")
        rows.setdefault((first, second, item["kind"], item["text"]), []).append(architecture)
    return [
        f"| {first} | {second} | {kind} | {', '.join(where)} | {_escaped(text)} |"
        for (first, second, kind, text), where in rows.items()
    ]


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", nargs="*", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--passes", nargs="*", default=(), help="try only pairs with one of these")
    parser.add_argument("--keep", action="store_true", help="keep results that other code gave")
    parser.add_argument("--limit", type=float, default=float("inf"), help="stop after so many seconds")
    given = parser.parse_args()
    found = find_all(given.architectures, given.passes, given.keep, given.limit)
    PAGE.write_text(page(found))
    wrong = [key for key, item in found.items() if item["kind"] == WRONG]
    print(
        f"wrote {PAGE}; {len(wrong)} wrong outcomes"
        + "".join(f"\n  {key}: {found[key]['text']}" for key in wrong)
    )


if __name__ == "__main__":
    main()
