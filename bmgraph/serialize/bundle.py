"""Reads and writes bundles: folders with a manifest of checksums, written atomically and not trusted when read.

Reading checks the names, kinds, sizes and sha256 of all files before any is used; nothing is unpickled or evaluated.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bmgraph.errors import BundleError
from bmgraph.serialize.aside import folder_aside, remove_left_behind, user_modes
from bmgraph.serialize.opened import OpenedFile, OpenedFolder, open_regular_file

FORMAT = 1
MANIFEST = "manifest.json"
KINDS = ("program", "engine", "delta", "trainer")
LARGEST_JSON = 128 * 2**20
MOST_JSON_VALUES = 2_000_000
"""Limit on memory: a value takes about 70 bytes in memory, but may take only 2 in the file."""
DEEPEST_JSON = 64
CHECKSUM = "checksum"
_ZEROS = "0" * 64
_SEAL = re.compile(rb'\{\n "checksum": "([0-9a-f]{64})",\n')
_BRACKET_OR_STRING = re.compile(rb'[\[\]{}]|"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_CONTROL = re.compile(
    rb"\x7f|\xc2[\x80-\x9f]|\xe2\x80[\xaa-\xae]|\xe2\x81[\xa6-\xa9]"
    rb"|(?<!\\)(?:\\\\)*\\(?:[bf]|u(?:00[01][0-9a-f]|007f|00[89][0-9a-f]|202[a-e]|206[6-9]))",
    re.IGNORECASE,
)
"""Control characters and changes of direction in JSON, as UTF-8 or as escapes."""

OF_HUBS = frozenset({".gitattributes", "README.md", ".cache"})
"""What Hugging Face's hub and its downloads put beside the files of a folder; never opened."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,120}\Z")
_ATTEMPTS = 100
"""How often a folder is opened again that was replaced meanwhile, or replaced by another saver: each time one has got on."""


@dataclass(frozen=True)
class Bundle:
    """A folder whose files match its manifest. They were opened once, and stay those that were checked."""

    path: Path
    kind: str
    manifest: dict[str, Any]
    opened: Mapping[str, OpenedFile] = field(repr=False)

    def open(self, name: str) -> OpenedFile:
        """A file of the bundle, opened before it was checked; raises BundleError if the manifest does not name it."""
        if name not in self.opened:
            raise BundleError(f"bundle {self.path} lacks {name!r}")
        return self.opened[name]

    def text(self, name: str) -> str:
        """The text of a file; raises BundleError if the manifest does not name it, and if it is not UTF-8."""
        try:
            return self.open(name).read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise BundleError(f"{name!r} in bundle {self.path} is not text: {error}") from error

    @property
    def digest(self) -> bytes:
        """sha256 of the manifest, and so of all files."""
        return hashlib.sha256(seal(self.manifest)).digest()


Writer = Callable[[Path], object]
"""Writes the file whose path it is given."""


def write_bundle(
    path: Path,
    kind: str,
    manifest: Mapping[str, object] | Callable[[], Mapping[str, object]],
    writers: Mapping[str, Writer],
) -> None:
    """Write a bundle to a hidden folder beside `path`, then rename it; what killed saves of it left there is removed.

    `writers` maps each file name to a function that writes the path it is given; the manifest comes last, and may be a
    function that says what is only known then. An older
    bundle at `path` is replaced; any other file or folder is not. Raises BundleError, and leaves no files behind, if the
    disk is full or a file cannot be written.
    """
    path = Path(path).absolute()
    with cannot_save(path):
        check_destination(path)
        with folder_aside(path) as aside:
            modes = user_modes(aside)
            files = {name: write_file(aside / name, modes[0], write) for name, write in writers.items()}
            told = manifest() if callable(manifest) else manifest
            commit(aside, path, kind, told, files, modes)


@contextmanager
def cannot_save(path: Path) -> Iterator[None]:
    """Raise BundleError where the system cannot write what belongs to a bundle."""
    try:
        yield
    except OSError as error:
        reason = (
            "the disk is full: free some space"
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            else error.strerror
        )
        raise BundleError(f"cannot save {path}: {reason}; nothing was changed") from error


def write_file(file: Path, mode: int, write: Writer) -> dict[str, object]:
    """Write one file of a bundle, with these permissions, and flush it; returns its size and sha256, for the manifest."""
    assert _NAME.match(file.name), file.name
    write(file)
    os.chmod(file, mode)
    entry = {"sha256": _sha256(file), "size": file.stat().st_size}
    flush(file)
    return entry


def commit(
    aside: Path,
    path: Path,
    kind: str,
    manifest: Mapping[str, object],
    files: Mapping[str, Mapping[str, object]],
    modes: tuple[int, int],
) -> None:
    """Write the manifest of the files in a folder aside (`folder_aside`), and give the folder its name and `modes[1]`."""
    complete = {"format": FORMAT, "kind": kind, **manifest, "files": files}
    (aside / MANIFEST).write_bytes(seal(complete))
    flush(aside / MANIFEST)
    os.chmod(aside, modes[1])
    flush(aside)
    _swap(aside, path)
    flush(path.parent)
    remove_left_behind(path)


def seal(manifest: Mapping[str, object]) -> bytes:
    """The bytes of a manifest file. They begin with their own checksum, computed with zeros in its place."""
    unsealed = {name: value for name, value in manifest.items() if name != CHECKSUM}
    data = json.dumps({CHECKSUM: _ZEROS, **unsealed}, indent=1, allow_nan=False).encode() + b"\n"
    return data.replace(_ZEROS.encode(), hashlib.sha256(data).hexdigest().encode(), 1)


def _is_sealed(data: bytes) -> bool:
    found = _SEAL.match(data)
    if found is None:
        return False
    unsealed = data[: found.start(1)] + _ZEROS.encode() + data[found.end(1) :]
    return hashlib.sha256(unsealed).hexdigest().encode() == found[1]


def check_destination(path: Path) -> None:
    """Make the folders above a path; raise BundleError where it holds anything but a bundle, which another saver may be
    replacing meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(_ATTEMPTS):
        try:
            found = os.lstat(path)
            if stat.S_ISLNK(found.st_mode):
                raise BundleError(f"cannot save {path}: it is a link; give the path of the folder itself")
            if not stat.S_ISDIR(found.st_mode):
                raise BundleError(f"cannot save {path}: a file of that name exists; choose another name")
            if not os.listdir(path) or _looks_like_bundle(path):
                return
            if os.lstat(path).st_ino == found.st_ino:
                break
        except (FileNotFoundError, NotADirectoryError):
            return
    raise BundleError(f"cannot save {path}: it is a folder with other contents; choose another name")


def _looks_like_bundle(path: Path) -> bool:
    """Whether a folder is a bundle, perhaps a damaged one; other formats have a manifest.json too."""
    try:
        manifest = strict_json(path / MANIFEST)
    except BundleError:
        return False
    return isinstance(manifest, dict) and manifest.get("kind") in KINDS and "format" in manifest


def _exchange(one: Path, other: Path) -> bool:
    """Swap the names of two folders atomically; False if the system cannot (Linux can on most file systems)."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, swap_names = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    done: int = renameat2(here, os.fsencode(one), here, os.fsencode(other), swap_names)
    return done == 0


def _swap(aside: Path, path: Path) -> None:
    """Rename the finished folder to `path`; if interrupted, either the old or the new bundle is complete there.

    Of several savers the last one's bundle stays. On systems that cannot exchange two names, an interruption may leave the
    old bundle under a hidden name instead.
    """
    for attempt in range(_ATTEMPTS):
        if _exchange(aside, path):
            shutil.rmtree(aside, ignore_errors=True)
            return
        try:
            if path.exists():
                _replace(aside, path)
            else:
                os.rename(aside, path)
            return
        except OSError as error:  # another saver was faster: it has put its bundle there, or taken it away
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT) or attempt == _ATTEMPTS - 1:
                raise


def _replace(aside: Path, path: Path) -> None:
    """Move the old folder away and the new one to its place; moves the old one back if that fails."""
    with folder_aside(path) as holder:
        old = holder / path.name
        os.rename(path, old)
        try:
            os.rename(aside, path)
        except OSError:
            if not path.exists():
                os.rename(old, path)
            raise


def flush(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(file: Path) -> str:
    return open_regular_file(file).sha256()


def read_bundle(path: Path) -> Bundle:
    """Open a folder's files once, and check them against its manifest.

    A folder that is saved anew meanwhile is opened again, so that all files are of one save. Raises BundleError naming the
    file if one is missing, unexpected, altered, truncated, a link or has an invalid name.
    """
    path = Path(path)
    if not path.is_dir():
        raise BundleError(f"{path} is not a bundle: there is no such folder")
    for attempt in range(_ATTEMPTS):
        folder = OpenedFolder(path)
        try:
            manifest, opened = _open_all(folder)
            break
        except BundleError:
            if not folder.was_replaced or attempt == _ATTEMPTS - 1:
                raise
    for name, entry in manifest["files"].items():
        _check_file(opened[name], entry)
    return Bundle(path, manifest["kind"], manifest, opened)


def _open_all(folder: OpenedFolder) -> tuple[dict[str, Any], dict[str, OpenedFile]]:
    """The manifest of a folder, and all files that it names, opened; their contents are not checked yet."""
    path = folder.path
    names = folder.names()
    if MANIFEST not in names:
        raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}")
    manifest = _read_manifest(folder.open(MANIFEST))
    opened = {name: folder.open(name) for name in manifest["files"]}
    extra = names - set(opened) - {MANIFEST} - OF_HUBS
    if extra:
        raise BundleError(f"bundle {path} holds {sorted(extra)[0]!r}, which its manifest does not name")
    return manifest, opened


def _read_manifest(file: OpenedFile) -> dict[str, Any]:
    """A manifest whose seal, format, kind and entries of files are valid."""
    data = _read_json(file)
    if not _is_sealed(data):
        raise BundleError(
            f"{file.path} was altered, or is not of bmgraph: its contents do not match its checksum"
        )
    manifest = _parsed(file.path, data)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise BundleError(f"{file.path} has format {found!r}: this version of bmgraph reads format {FORMAT}")
    if manifest.get("kind") not in KINDS:
        raise BundleError(
            f"{file.path} is of kind {manifest.get('kind')!r}: expected one of {', '.join(KINDS)}"
        )
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise BundleError(f"{file.path} names no files")
    for name, entry in files.items():
        if not _NAME.match(name) or name == MANIFEST:
            raise BundleError(f"{file.path} names the file {name!r}, which is not a valid file name")
        if (
            not isinstance(entry, dict)
            or type(entry.get("size")) is not int
            or not isinstance(entry.get("sha256"), str)
        ):
            raise BundleError(f"{file.path} lacks the size and checksum of {name!r}")
    return manifest


def _check_file(file: OpenedFile, entry: Mapping[str, Any]) -> None:
    where = f"{file.path.name!r} in bundle {file.path.parent}"
    size = file.status.st_size
    if size != entry["size"]:
        raise BundleError(
            f"{where} has {size} bytes, but its manifest says {entry['size']}: it is truncated or altered"
        )
    if not file.check(entry["sha256"]):
        raise BundleError(f"{where} was altered: its checksum differs from the manifest")


def strict_json(file: Path | OpenedFile) -> Any:
    """Parse a JSON file; raises BundleError if it is too large or deep, repeats a key or has NaN."""
    opened = open_regular_file(file) if isinstance(file, Path) else file
    return _parsed(opened.path, _read_json(opened))


def _read_json(file: OpenedFile) -> bytes:
    if file.status.st_size > LARGEST_JSON:
        raise BundleError(f"{file.path} is larger than {LARGEST_JSON // 2**20} MiB")
    return bytes(file.read())


def _parsed(file: Path, data: bytes) -> Any:
    try:
        return parse_json(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file} is not valid JSON: {str(error)[:200]}") from error


def parse_json(data: bytes) -> Any:
    """Parse JSON; raises ValueError if it is too deep, has too many values, repeats a key or has numbers beyond 64 bits.

    Bytes, values and depth are bounded before anything is parsed. Control characters are refused, written out or as escapes:
    names in a file are printed, in errors and reports. (Line ends and tabs are allowed.)
    """
    if len(data) > LARGEST_JSON:
        raise ValueError(f"it is larger than {LARGEST_JSON // 2**20} MiB")
    if sum(map(data.count, (b",", b"[", b"{"))) > MOST_JSON_VALUES:
        raise ValueError("it has too many values")
    check_depth(data)
    if _CONTROL.search(data):
        raise ValueError("it holds control characters, which could act on a terminal")
    value = json.loads(
        data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_int=_integer,
        parse_float=_finite,
    )  # fmt: skip
    if b"\\ud" in data.lower():
        json.dumps(
            value, ensure_ascii=False
        ).encode()  # raises ValueError for half of a pair, which is no character
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= (number := int(text)) < 2**64:
        raise ValueError(f"{text[:30]} is not a number of 64 bits")
    return number


def _finite(text: str) -> float:
    number = float(text[:1000])
    if len(text) > 1000 or not math.isfinite(number):
        raise ValueError(f"{text[:30]} is not a number of 64 bits")
    return number


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return found


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a valid JSON number")


def check_depth(data: bytes) -> None:
    """Raise ValueError if brackets outside of strings are nested too deeply."""
    depth = 0
    for found in _BRACKET_OR_STRING.finditer(data):
        first = data[found.start()]
        if first in b"[{":
            depth += 1
            if depth > DEEPEST_JSON:
                raise ValueError("it is nested too deeply")
        elif first in b"]}":
            depth -= 1
