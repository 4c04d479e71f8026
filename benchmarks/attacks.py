"""Attacks, tried and held: planted wrong passes, hostile files, kills, loads beside savers, ranks that disagree.

Writes results/attacks.json: for each kind how many were tried, how many were stopped or harmless, seconds, and the most
memory of a process. `python -m benchmarks.attacks` runs all of them (each kind at most 20 minutes), `--short` a few of each kind, `--only
plants` one kind. Seeded: the same attacks each time.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import BmgraphError
from bmgraph.ir.pass_record import machine
from tests.helpers.attacks import adapters as hostile_adapters
from tests.helpers.attacks import checkpoints as hostile_checkpoints
from tests.helpers.attacks import command_line
from tests.helpers.attacks import folders as hostile_folders
from tests.helpers.attacks.command_line import CASES
from tests.helpers.attacks.loading import bombs, kill_savers, mutated
from tests.helpers.attacks.ranks import FAULTS, SECONDS, attack
from tests.helpers.attacks.savers import LOADERS, load_beside_a_saver
from tests.helpers.attacks.watched import Outcome as Loaded
from tests.helpers.attacks.watched import Watched
from tests.helpers.bundles import toy
from tests.helpers.plants import ENDS, PLANTS, Plant
from tests.helpers.ranks import run_ranks

HERE = Path(__file__).parent


@dataclass
class Outcome:
    """One kind of attack. `broken` names those that got through, or stopped what is right."""

    tried: int = 0
    held: int = 0
    broken: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_mb: float = 0.0
    slowest: float = 0.0
    """Seconds of the slowest attack, where each is timed."""
    grown_mb: float = 0.0
    """The most memory by which an attack made a process grow."""

    def note(self, name: str, held: bool) -> None:
        """Count one attack."""
        self.tried += 1
        self.held += held
        if not held:
            self.broken.append(name)


def plants(seed: int, short: bool) -> Outcome:
    """Planted wrong passes at default settings; the passes without a plant must run."""
    outcome = Outcome()
    chosen = random.Random(seed).sample(PLANTS, 12 if short else len(PLANTS))
    with tempfile.TemporaryDirectory() as folder:
        for plant in chosen:
            outcome.note(plant.name, _stopped(plant, Path(folder)))
        for kind, (on, item, resources) in ENDS.items():
            honest = Plant(kind, on, item, lambda program: None, resources)
            outcome.note(f"{kind}, without a fault", not _stopped(honest, Path(folder)))
    return outcome


def _stopped(plant: Plant, folder: Path) -> bool:
    try:
        plant.run(folder)
    except BmgraphError as error:
        return "pass faulty" in str(error)
    return False


def ranks(seed: int, short: bool) -> Outcome:
    """Faults of one rank among two and three: told on all, with a reason, within seconds."""
    outcome = Outcome()
    names = random.Random(seed).sample(list(FAULTS), 5 if short else len(FAULTS))
    for size in (2,) if short else (2, 3):
        with tempfile.TemporaryDirectory() as folder:
            told = run_ranks(size, attack, size, names, folder)
        for name in names:
            outcome.note(f"{name}, on one of {size}", all(_was_told(found[name]) for found in told))
    return outcome


def _was_told(found: tuple[str, float]) -> bool:
    """Whether a rank raised a clear error in little time of the processor, and not because it waited for another in vain; what
    the user's own function raised is as clear as it is."""
    error, seconds = found
    clear = "UNCLEAR" not in error or "of this rank" in error
    return bool(error) and clear and "in vain" not in error and seconds < SECONDS


def mutations(seed: int, short: bool) -> Outcome:
    """Changed bundles, signed again: refused, or loaded as what they say, in time and memory."""
    count = 60 if short else 1000
    return _loads(lambda saved, folder: mutated(saved, folder, count, seed))


def resources(seed: int, short: bool) -> Outcome:
    """Small files that ask for much."""
    count = 6 if short else 60
    return _loads(lambda saved, folder: bombs(saved[0], saved[1], folder, count, seed))


def _loads(attacks: Callable[[list[Path], Path], Iterable[tuple[str, Path]]]) -> Outcome:
    """Load each attacked bundle in a process that is watched."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="bmgraph-attacks-") as folder:
        saved = _originals(Path(folder))
        watched = Watched(saved)
        try:
            for name, path in attacks(saved, Path(folder) / "attacked"):
                found = watched.load(name, path)
                _note_watched(outcome, found, found.held)
        finally:
            watched.close()
    return outcome


def _originals(folder: Path) -> list[Path]:
    """A program and an engine to attack."""
    toy().save(str(folder / "program"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 2))
    bg.compile(model, example=(torch.randn(3, 64),), backend="onnx").save(str(folder / "engine"))
    return [folder / "program", folder / "engine"]


def kills(seed: int, short: bool) -> Outcome:
    """Savers killed in the middle: the bundle is the old or the new one, and nothing is left beside it."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="bmgraph-attacks-") as folder:
        for wrong in kill_savers(Path(folder) / "bundle", 5 if short else 200, seed):
            outcome.note(wrong, not wrong)
    return outcome


def folders(seed: int, short: bool) -> Outcome:
    """Hostile folders of models: refused, or the model that their weights hold; no code of theirs runs."""
    return _each(hostile_folders, hostile_folders.original, seed, 5 if short else 0)


def checkpoints(seed: int, short: bool) -> Outcome:
    """Hostile training checkpoints: refused, and nothing is taken over, or loaded as what they hold."""
    return _each(hostile_checkpoints, hostile_checkpoints.original, seed, 5 if short else 0)


def adapters(seed: int, short: bool) -> Outcome:
    """Hostile adapters, of bmgraph and of PEFT: refused, or loaded as what they hold."""
    return _each(hostile_adapters, hostile_adapters.original, seed, 5 if short else 0)


def _each(attacks: Any, original: Callable[[Path], list[Path]], seed: int, count: int) -> Outcome:
    """Try `count` of the attacks of a module (0: all of them), each in a process that is watched."""
    outcome = Outcome()
    names = list(attacks.CASES)
    with tempfile.TemporaryDirectory(prefix="bmgraph-attacks-") as folder:
        saved = original(Path(folder) / "original")
        watched = Watched(saved, f"{attacks.__name__}:loader")
        try:
            chosen = random.Random(seed).sample(names, count or len(names))
            for name, path in attacks.attacked(saved, Path(folder) / "attacked", chosen):
                found = watched.load(name, path)
                held = found.held and (found.end == "refused" or name in attacks.HARMLESS)
                _note_watched(outcome, found, held)
        finally:
            watched.close()
    return outcome


def _note_watched(outcome: Outcome, found: Loaded, held: bool) -> None:
    outcome.note(f"{found.attack}: {found.end} {found.told}", held)
    outcome.slowest = round(max(outcome.slowest, found.seconds), 2)
    outcome.grown_mb = round(max(outcome.grown_mb, found.grown / 2**20))


def savers(seed: int, short: bool) -> Outcome:
    """Loads beside a process that replaces the bundle all the time: one that was saved, whole, or one clear error."""
    outcome = Outcome()
    for kind in LOADERS:
        with tempfile.TemporaryDirectory(prefix="bmgraph-attacks-") as folder:
            for wrong, seconds in load_beside_a_saver(kind, Path(folder), 10 if short else 250):
                outcome.note(f"{kind}: {wrong}", not wrong)
                outcome.slowest = round(max(outcome.slowest, seconds), 2)
    return outcome


def commands(seed: int, short: bool) -> Outcome:
    """Odd calls of the command line: exit code 0 or 2, one line, no traceback, no control characters."""
    outcome = Outcome()
    names = random.Random(seed).sample(list(CASES), 4 if short else len(CASES))
    with tempfile.TemporaryDirectory(prefix="bmgraph-attacks-") as folder:
        for name, wrong in command_line.attack(names, Path(folder)).items():
            outcome.note(f"{name}: {wrong}", not wrong)
    return outcome


KINDS: dict[str, Callable[[int, bool], Outcome]] = {
    "plants": plants,
    "ranks": ranks,
    "mutations": mutations,
    "resources": resources,
    "folders": folders,
    "checkpoints": checkpoints,
    "adapters": adapters,
    "kills": kills,
    "savers": savers,
    "commands": commands,
}
"""Name of a kind of attack -> the function that tries it, given a seed and whether to try only a few."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few attacks of each kind; writes nothing")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds to try")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name in options.only:
        begin = time.perf_counter()
        outcome = KINDS[name](options.seed, options.short)
        outcome.seconds = round(time.perf_counter() - begin, 1)
        outcome.peak_mb = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        found[name] = asdict(outcome)
        print(
            f"{name}: {outcome.held} of {outcome.tried} held in {outcome.seconds:.0f} s",
            *outcome.broken,
            sep="\n  ",
        )
    if not options.short:
        path = HERE / "results" / "attacks.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        known = {
            **known,
            "machine": machine(),
            "seed": options.seed,
            "attacks": {**known.get("attacks", {}), **found},
        }
        path.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    if any(outcome["broken"] for outcome in found.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
