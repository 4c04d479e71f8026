"""LoRA+: the second factor of a delta trains at a multiple of the learning rate (Hayou et al. 2024, arXiv:2402.12354)."""

from __future__ import annotations

import math
from collections.abc import Collection

from bmgraph.deltas.registry import deltas_of
from bmgraph.errors import InputError, PassError
from bmgraph.ir.evaluation import upstream
from bmgraph.ir.program import Program


def check_lr_ratio(ratio: float) -> None:
    """Raise InputError for what is no factor of a learning rate."""
    if not (math.isfinite(ratio) and ratio > 0):
        raise InputError(f"lr_ratio={ratio}: give a number above 0, such as 16")


def set_lr_ratio(program: Program, known: Collection[str], whole: Collection[str], ratio: float) -> None:
    """Let the faster tensors of new deltas train at `ratio` times the learning rate, and with them the vectors that train whole
    beside them (biases), as the authors' code and PEFT do.

    `known`: the parameters before the deltas came; `whole`: those that trained whole then. Raises PassError where a family has
    no faster tensor.
    """
    if ratio == 1:
        return
    faster: set[str] = set()
    for graph in program.graphs.values():
        for delta in deltas_of(graph):
            for key in delta.family.faster:
                if key in delta.tensors:
                    nodes = upstream(delta.tensors[key])
                    faster |= {str(node.target) for node in nodes if node.op == "get_attr"}
    faster = {name for name in faster - set(known) if name not in program.frozen}
    if not faster:
        raise PassError(
            f"lr_ratio={ratio:g}: the delta has no factor that LoRA+ lets train faster, as LoRA and DoRA have; leave it out"
        )
    faster |= {
        name
        for name in program.trained_whole - set(whole)
        if name in program.parameters and program.parameters[name].dim() == 1
    }
    program.lr_factors |= dict.fromkeys(sorted(faster), float(ratio))
