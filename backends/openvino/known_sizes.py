"""Sizes that the program knows, written where a reshape leaves them to be found."""

from __future__ import annotations

import torch

from bmgraph.ir.program import Program


def write_known_sizes(program: Program) -> int:
    """Replace a -1 in the sizes of a reshape by the number that it stands for, in place, where that is always the same; returns the count.

    OpenVINO infers no size from -1 beside dynamic ones. Attention with a cache in 8 bits groups codes by the size of a head: where
    it does not know it, the state is read with a wrong stride.
    """
    count = 0
    for node in program.graph.nodes:
        if node.target is not torch.ops.aten.reshape.default:
            continue
        sizes = list(node.args[1])
        if -1 not in sizes:
            continue
        place = sizes.index(-1)
        size = node.meta["val"].shape[place]
        if isinstance(size, int):
            node.update_arg(1, [*sizes[:place], size, *sizes[place + 1 :]])
            count += 1
    return count
