"""Large blocks are mapped by themselves, however often such blocks were freed before."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

IN_A_PROCESS_OF_ITS_OWN = """
import ctypes, torch
from bmgraph.utils.host_memory import MAPPED, map_large_blocks

class Blocks(ctypes.Structure):  # glibc's struct mallinfo2; hblks are the blocks that are mapped
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

library = ctypes.CDLL(None)
library.mallinfo2.restype = Blocks
if {called}:
    map_large_blocks([torch.empty(2**26, device="meta")])
for size in (16, 2, 2):  # what is freed is no longer in the way of smaller blocks
    before = library.mallinfo2().hblks
    block = torch.empty(size * MAPPED, dtype=torch.uint8)
    print(library.mallinfo2().hblks - before)
    del block
"""


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="no glibc")
@pytest.mark.parametrize(("called", "mapped"), [(True, "111"), (False, "100")])
def test_large_blocks_are_mapped_again_and_again(
    called: bool, mapped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    program = IN_A_PROCESS_OF_ITS_OWN.replace("{called}", str(called))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(mapped)
