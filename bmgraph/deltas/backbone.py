"""The backbone of a program: what belongs to no delta and no prompt."""

from __future__ import annotations

import warnings

import torch

from bmgraph.deltas.registry import families
from bmgraph.errors import VerificationError
from bmgraph.ir.node_role import is_delta
from bmgraph.ir.program import Program


def backbone_of(program: Program) -> dict[str, torch.Tensor]:
    """Name -> tensor of all parameters that belong to no delta and no prompt, of whatever family."""
    owned = {
        str(node.target)
        for graph in program.graphs.values()
        for node in graph.nodes
        if node.op == "get_attr" and is_delta(node)
    }
    owned.update(*(family.tensors(program) for family in families()))
    return {name: tensor for name, tensor in program.parameters.items() if name not in owned}


CHOSEN = "chosen-to-train"
"""Provided by a pass that says which parameters of the backbone train."""


def freeze_backbone(program: Program) -> None:
    """Freeze every parameter except those of deltas and prompts, and all integer parameters.

    What is frozen already stays so: deltas of which each row selects one, or a delta that the user froze. Warns where an
    earlier pass was asked to let parts of the backbone train.
    """
    chosen = [record.text for record in program.history if CHOSEN in record.provides]
    trains = sorted(set(backbone_of(program)) - program.frozen)
    if chosen and trains:
        warnings.warn(
            f"{chosen[-1]} let {trains[0]} train ({len(trains)} parameters in all), and a delta freezes all but its own: run it "
            "behind the delta",
            stacklevel=2,
        )
    program.frozen |= frozenset(backbone_of(program)) | {
        name for name, tensor in program.parameters.items() if not tensor.is_floating_point()
    }


def check_backbone_frozen(program: Program) -> None:
    """Raise VerificationError where a parameter trains that belongs to no delta and no prompt."""
    trains = sorted(set(backbone_of(program)) - program.frozen)
    if trains:
        raise VerificationError(
            f"{trains[0]!r} of the backbone is left to train ({len(trains)} parameters in all)"
        )
