"""Large blocks are mapped by themselves, however often such blocks were freed before."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch

from bmgraph.utils.host_memory import MAPPED, map_large_blocks


class Blocks(ctypes.Structure):
    """glibc's `struct mallinfo2`; `hblks` are the blocks that are mapped."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]  # fmt: skip


def mapped() -> int:
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = Blocks
    return int(library.mallinfo2().hblks)


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="no glibc")
def test_large_blocks_are_mapped_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    map_large_blocks([torch.empty(2**26, device="meta")])
    for _ in range(3):
        before = mapped()
        block = torch.empty(2 * MAPPED, dtype=torch.uint8)
        assert mapped() == before + 1
        del block
        assert mapped() == before
