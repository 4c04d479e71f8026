"""A folder that keeps what passes have finished, so that a run that was stopped goes on where it was.

It holds, in files that are written whole or not at all (`serialize/kept_values.py`): what the work is (`work`), the program after the last
pass that finished (`pass-NUMBER`), and of the pass that runs what it has found so far, such as the codes of a layer
(`kept-NUMBER-...`). All is of one run: of the same program, passes, settings, data, versions and machine, and refused for another.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bmgraph.errors import BundleError, InputError, ResourceError
from bmgraph.serialize.aside import remove_all_left_behind
from bmgraph.serialize.kept_values import read_values, write_values
from bmgraph.utils.locked_folder import lock_folder

if TYPE_CHECKING:
    from bmgraph.pass_manager.context import Context

Value = TypeVar("Value")

Reads = dict[str, tuple[int | None, str]]
"""Name of a resource -> how many of its batches were read, None for one that is read whole, and their digest."""

FORMAT = "1"
SUFFIX = ".safetensors"
WORK = f"work{SUFFIX}"

_OURS = re.compile(
    rf"(work|pass-\d{{3,}}|kept-\d{{3,}}-[0-9a-f]{{24}}){re.escape(SUFFIX)}\Z|\..+-bmgraph-[A-Za-z0-9_]{{8}}\Z|for-[A-Za-z0-9_.-]+\Z"
)
_KEPT = re.compile(r"(pass|kept)-(\d+)")

ATTEMPTS = 10
"""How often a folder is made that another run has removed meanwhile."""


class ResumeFolder:
    """The folder of one run, locked while its process lives. `about` says more of what the work is; `inner`: it is within that of a
    run, which tells of it.

    Raises InputError where another process works there, or for a folder with other contents, ResourceError where it cannot be
    written.
    """

    def __init__(self, path: Path, about: Mapping[str, str] | None = None, inner: bool = False) -> None:
        self.path, self.about, self._is_inner = path, dict(about or {}), inner
        self.reads: list[Reads] = [{}]
        """What is read of resources: of the pass that runs and, behind it, of what is being found within it."""
        self._lock = _locked(path)
        self._sizes: dict[str, int] = {}
        self._peak = self.passes = self.found = 0
        self._known: dict[tuple[str, int | None], str] = {}
        self._parts: list[ResumeFolder] = []
        try:
            names = self._names()
            remove_all_left_behind(path)
        except InputError:
            self.close()
            raise
        for name in names:
            self._count(name)

    def for_backend(self, name: str) -> ResumeFolder:
        """The folder of the same run for one of several backends, within this one."""
        self._parts.append(ResumeFolder(self.path / f"for-{name}", inner=True))
        return self._parts[-1]

    def begin(self, identity: Mapping[str, str]) -> None:
        """Say what the work is. Raises InputError where the folder holds other work, naming what differs."""
        mine = {"format": FORMAT, **identity, **self.about}
        theirs = self._read(WORK) if (self.path / WORK).exists() else None
        if not isinstance(theirs, dict):
            for name in [*self._sizes]:
                self._remove(name)
            self._write(WORK, mine)
        elif theirs != mine:
            different = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
            raise InputError(self.other_work(_in_words(different[0], theirs, mine)))

    def other_work(self, what: str) -> str:
        """What to say where the folder holds other work: `what` differs."""
        return (
            f"{self.path} holds unfinished work of another run: {what}; run what it was begun with, name another folder, or delete it "
            "to begin anew"
        )

    def last_pass(self) -> tuple[int, Any] | None:
        """The number of the last pass that finished, and what was kept of it; None where there is none that can be used."""
        numbers = sorted(int(_KEPT.match(name)[2]) for name in self._sizes if name.startswith("pass-"))  # type: ignore[index]
        for number in reversed(numbers):
            value = self._read(_pass_file(number))
            if value is not None:
                return number, value
        return None

    def finish_pass(self, number: int, value: object) -> None:
        """Keep what a pass has made, in the place of all that was kept before it."""
        if self._write(_pass_file(number), value):
            self.forget_before(number)

    def forget_before(self, number: int) -> None:
        """Remove what the passes before one and itself had found, which it is known to have finished."""
        for name in [*self._sizes]:
            found = _KEPT.match(name)
            if found and (int(found[2]) < number or (int(found[2]) == number and found[1] == "kept")):
                self._remove(name)

    def take(self, name: str) -> Any:
        """What a file holds; None where it is not there or, which is told, cannot be used."""
        return self._read(name) if name in self._sizes else None

    def put(self, name: str, value: object) -> None:
        """Keep a value under the name of a file."""
        self._write(name, value)

    def note_read(self, name: str, count: int | None, digest: str) -> None:
        """Note that this many batches of a resource were read, or all of what it is."""
        self.reads[-1][name] = count, digest

    @contextmanager
    def reading(self) -> Iterator[Reads]:
        """Gives what is read of resources within it."""
        found: Reads = {}
        self.reads.append(found)
        try:
            yield found
        finally:
            self.reads.pop()
            self.reads[-1] |= found

    def read_again(self, name: str, count: int | None, compute: Callable[[], str]) -> str:
        """The digest of what is read of a resource, computed once."""
        key = name, count
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    @property
    def bytes(self) -> int:
        """How many bytes of files it has held at most."""
        return self._peak + sum(item.bytes for item in self._parts)

    def lines(self) -> list[str]:
        """What to tell the user, of those within it too; of an inner one nothing."""
        if self._is_inner:
            return []
        passes, found = (
            sum(getattr(item, name) for item in (self, *self._parts)) for name in ("passes", "found")
        )
        went_on = (
            f"went on from {self.path}: {passes} passes and {found} parts of others were finished before"
        )
        return [
            *([went_on] if passes or found else []),
            f"{self.path} held {self.bytes / 1e6:.1f} MB of finished work at most, and is removed",
        ]

    def clear(self) -> None:
        """Remove all of it, and the folder."""
        for part in self._parts:
            part.clear()
        for name in [*self._sizes]:
            self._remove(name)
        for path in self.path.glob("for-*"):
            shutil.rmtree(path, ignore_errors=True)  # of a backend that was not asked for again
        remove_all_left_behind(self.path)
        with suppress(OSError):  # something was put beside it
            self.path.rmdir()

    def close(self) -> None:
        """Let other processes use it."""
        for part in self._parts:
            part.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _names(self) -> list[str]:
        """The names of its files. Raises InputError where others are there."""
        names = sorted(os.listdir(self.path))
        other = [name for name in names if not _OURS.match(name)]
        if other:
            raise InputError(
                f"resume={str(self.path)!r} is a folder with other contents ({other[0]}): name a new folder"
            )
        return [name for name in names if name.endswith(SUFFIX)]

    def _read(self, name: str) -> Any:
        """What a file holds; None, with a warning, where it cannot be used."""
        try:
            return read_values(self.path / name)
        except (BundleError, OSError) as error:
            warnings.warn(f"what {self.path} keeps is computed again: {error}", stacklevel=2)
            self._remove(name)
            return None

    def _write(self, name: str, value: object) -> bool:
        """Write a file; returns whether it could be: a value that no file holds is told, and not kept."""
        try:
            write_values(self.path / name, value)
        except BundleError as error:
            if isinstance(error.__cause__, OSError):
                raise ResourceError(
                    f"finished work cannot be kept: {error}; what was kept before stays"
                ) from error
            warnings.warn(f"finished work is not kept in {self.path}: {error}", stacklevel=2)
            return False
        self._count(name)
        return True

    def _count(self, name: str) -> None:
        self._sizes[name] = (self.path / name).lstat().st_size
        self._peak = max(self._peak, sum(self._sizes.values()))

    def _remove(self, name: str) -> None:
        self._sizes.pop(name, None)
        (self.path / name).unlink(missing_ok=True)


@dataclass
class Work:
    """A place in a run: within the pass of this number, in the passes of `path` and what they try. What is kept there is found at the
    same place of the next run."""

    folder: ResumeFolder
    number: int
    path: tuple[str, ...]
    _kept: int = field(default=0, init=False)
    _runs: int = field(default=0, init=False)

    def run(self, text: str) -> Work:
        """The place of the next pass that runs within this one."""
        self._runs += 1
        return Work(self.folder, self.number, (*self.path, f"{self._runs}: {text}"))

    def tried(self, text: str) -> Work:
        """The place of a pass that is tried, perhaps several times, on the same program."""
        return Work(self.folder, self.number, (*self.path, text))

    def kept(self, what: str, context: Context, make: Callable[[], Value]) -> Value:
        """What was found here before, from the same data, else what `make` finds, which is kept. Raises InputError for other data."""
        self._kept += 1
        title = " / ".join((*self.path, f"{self._kept}: {what}"))
        name = f"kept-{self.number:03d}-{hashlib.sha256(title.encode()).hexdigest()[:24]}{SUFFIX}"
        before, found = dict(context.digests), self.folder.take(name)
        if isinstance(found, dict) and found.get("title") == title:
            for resource in {**found["before"], **before}:
                if found["before"].get(resource) != before.get(resource):
                    raise InputError(self.folder.other_work(_DATA.format(resource)))
            self.check_reads(found["reads"], context)
            context.digests = found["after"]
            self.folder.found += 1
            return found["value"]  # type: ignore[no-any-return]
        with self.folder.reading() as reads:
            value = make()
        after = dict(context.digests)
        self.folder.put(
            name, {"title": title, "before": before, "reads": reads, "after": after, "value": value}
        )
        return value

    def check_reads(self, reads: Reads, context: Context) -> None:
        """Raise InputError where a resource no longer holds what was read of it before."""
        before = dict(context.digests)
        for name, (count, recorded) in reads.items():
            if self.folder.read_again(name, count, partial(context.reread, name, count)) != recorded:
                raise InputError(self.folder.other_work(_DATA.format(name)))
            self.folder.note_read(name, count, recorded)
        context.digests = before


@contextmanager
def resuming(path: str | os.PathLike[str] | None) -> Iterator[ResumeFolder | None]:
    """The folder of a run, None where none is named; removed at the end of a run that succeeds, left as it is where one fails."""
    if path is None:
        yield None
        return
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"resume={path!r}: give the path of a folder, in which finished work is kept")
    folder = ResumeFolder(Path(path))
    try:
        yield folder
        folder.clear()
    finally:
        folder.close()


_DATA = "the resource {!r} holds other data"


def _in_words(name: str, then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What of two works differs."""
    values = (str(then.get(name)), str(now.get(name)))
    if any(re.fullmatch(r"(2:)?[0-9a-f]{64}", value) for value in values):
        return f"the {name} differs"
    return f"{name} was {values[0]}, and is {values[1]} now"


def _pass_file(number: int) -> str:
    return f"pass-{number:03d}{SUFFIX}"


def _locked(path: Path) -> int | None:
    """Make a folder and lock it."""
    for _ in range(ATTEMPTS):
        try:
            path.mkdir(parents=True, exist_ok=True)
            return lock_folder(path)
        except FileNotFoundError:
            continue  # the run that had it has just removed it
        except BlockingIOError as error:
            raise InputError(
                f"another process works in {path}: wait until it has ended, or name another folder for resume="
            ) from error
        except OSError as error:
            raise ResourceError(
                f"resume={str(path)!r} cannot be a folder: {error.strerror or error}"
            ) from error
    raise ResourceError(f"resume={str(path)!r} is removed again and again: name another folder")
