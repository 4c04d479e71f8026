"""Reads past the system's page cache give the bytes of the very file that was opened, or say that they cannot."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmgraph.errors import BundleError
from bmgraph.serialize.direct_reads import PAGE, open_direct
from bmgraph.serialize.opened import PART_PAGES, OpenedFile, open_regular_file

SIZE = 2 * PART_PAGES + 3 * PAGE + 777
DATA = random.Random(0).randbytes(SIZE)


def _opened(file: Path) -> OpenedFile:
    file.write_bytes(DATA)
    opened = open_regular_file(file)
    why_not = opened.bypass_cache()
    if why_not:
        pytest.skip(why_not)
    return opened


def _part(opened: OpenedFile, begin: int, size: int) -> bytes:
    into = bytearray(size)
    opened.part(begin, memoryview(into), memoryview(mmap.mmap(-1, PART_PAGES)))
    return bytes(into)


@pytest.fixture(scope="module", params=[False, True], ids=["unchecked", "checked"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OpenedFile:
    found = _opened(tmp_path_factory.mktemp("direct") / "file")
    assert not request.param or found.check(hashlib.sha256(DATA).hexdigest())
    return found


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_part_is_read_as_it_is(opened: OpenedFile, data: st.DataObject) -> None:
    begin = data.draw(
        st.one_of(st.integers(0, SIZE - 1), st.sampled_from([0, PAGE, PART_PAGES - 1, SIZE - 1]))
    )
    size = data.draw(st.integers(0, SIZE - begin))
    assert _part(opened, begin, size) == DATA[begin : begin + size]


def test_what_lies_behind_the_end_is_an_error(opened: OpenedFile) -> None:
    for begin, size in ((SIZE - 5, 6), (SIZE, 1), (SIZE + 2 * PAGE, 10)):
        with pytest.raises(BundleError, match="altered"):
            _part(opened, begin, size)


def test_the_very_file_is_read_that_was_opened(tmp_path: Path) -> None:
    opened = _opened(tmp_path / "file")
    (tmp_path / "other").write_bytes(b"x" * SIZE)
    os.replace(tmp_path / "other", tmp_path / "file")
    assert _part(opened, 10, 100) == DATA[10:110]
    late = open_regular_file(tmp_path / "file")
    (tmp_path / "file").unlink()
    assert late.bypass_cache() == ""
    assert _part(late, 10, 100) == b"x" * 100


def test_bytes_that_were_checked_are_compared(tmp_path: Path) -> None:
    opened = _opened(tmp_path / "file")
    assert opened.check(hashlib.sha256(DATA).hexdigest())
    with open(tmp_path / "file", "r+b") as stream:
        stream.seek(PART_PAGES + 5)
        stream.write(b"?")
    assert _part(opened, 0, PART_PAGES) == DATA[:PART_PAGES]
    with pytest.raises(BundleError, match="altered"):
        _part(opened, PART_PAGES, 3)


def test_a_file_system_that_refuses_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(DATA)
    opened = open_regular_file(tmp_path / "file")

    def refused(*_: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    for name in ("open", "preadv"):
        with monkeypatch.context() as patched:
            patched.setattr(f"bmgraph.serialize.direct_reads.os.{name}", refused)
            assert opened.bypass_cache() == "O_DIRECT is refused: Invalid argument"
    assert _part(opened, 10, 100) == DATA[10:110]
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    assert open_direct(0) == "this system has no O_DIRECT"
