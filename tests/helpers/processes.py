"""Fresh processes that inherit no state from the test that starts them."""

from __future__ import annotations

from typing import Any

import torch.multiprocessing as mp


def fresh_processes() -> Any:
    """A multiprocessing context whose processes inherit no state. Where the system supports it they are forked from a server
    that has imported the library and nothing else, since importing takes longer than most tests."""
    if "forkserver" not in mp.get_all_start_methods():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(
        ["bmgraph.backends", "bmgraph.passes", "torch.distributed", "torch.fx.experimental"]
    )
    return context
