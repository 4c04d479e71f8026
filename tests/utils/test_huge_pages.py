"""Huge pages are asked for in large blocks without a file, and nothing else."""

from __future__ import annotations

import sys

import pytest

from bmgraph.utils.huge_pages import SMALLEST, anonymous_blocks, use_huge_pages

MAPS = """\
00400000-00c00000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000800000 rw-p 00000000 00:00 0
7f0001000000-7f0001800000 r--p 00000000 00:00 0
7f0002000000-7f0002800000 rw-p 00000000 08:01 1234               /lib/libc.so
7f0003000000-7f0003800000 rw-s 00000000 00:00 0
7f00040ff000-7f0004201000 rw-p 00000000 00:00 0
7ffe00000000-7ffe00800000 rw-p 00000000 00:00 0                  [stack]
"""


def test_blocks_are_private_writable_and_without_a_file() -> None:
    assert list(anonymous_blocks(MAPS)) == [(0x00400000, 4 * SMALLEST), (0x7F0000000000, 4 * SMALLEST)]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is asked for")
def test_this_process_has_some() -> None:
    block = bytearray(8 * SMALLEST)
    assert use_huge_pages() >= 0
    assert not any(block[::4096])
