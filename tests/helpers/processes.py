"""Processes that hold nothing of the test that starts them."""

from __future__ import annotations

from typing import Any

import torch.multiprocessing as mp


def fresh_processes() -> Any:
    """A context whose processes know what a module gives when it is imported, and nothing else: where the system can, they
    are copies of one that has imported the library and nothing else, as importing takes longer than most tests."""
    if "forkserver" not in mp.get_all_start_methods():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(
        ["bmgraph.backends", "bmgraph.passes", "torch.distributed", "torch.fx.experimental"]
    )
    return context
