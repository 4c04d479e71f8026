"""Gates on whole layers: how they are attached, and the program without the layers whose gates are closed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.structure.layer_blocks import Block
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import NodeRole, has_role
from bmgraph.ir.program import Program
from bmgraph.ir.shape_inference import value
from bmgraph.pass_manager.context import Context
from bmgraph.passes.shrink.gates import new_gates

aten = torch.ops.aten


@dataclass(frozen=True)
class GatedLayer:
    """A layer with a gate: `node` is `leaves` times the gate and `enters` times what it lacks to 1."""

    path: str
    node: fx.Node
    leaves: fx.Node
    enters: fx.Node
    gate: fx.Node
    rest: fx.Node


def gated_layers(program: Program) -> list[GatedLayer]:
    """All layers that have gates, in the order of the graph."""
    found = []
    for node in program.graph.nodes:
        products: Any = node.args
        if not has_role(node, NodeRole.LAYER_GATES) or node.target is not aten.add.Tensor:
            continue
        if all(isinstance(item, fx.Node) and item.target is aten.mul.Tensor for item in products):
            (leaves, gate), (enters, rest) = (item.args for item in products)
            found.append(GatedLayer(str(node.meta["site"]), node, leaves, enters, gate, rest))
    return found


def attach_layer_gates(editor: Editor, blocks: Sequence[Block]) -> list[tuple[str, str]]:
    """Let what follows each layer read what leaves it times its gate, and what enters it times one minus that: an open gate changes
    no bit. Returns the names of their noise and log alpha, in the order of the layers."""
    pairs = []
    for block in sorted(
        blocks, key=lambda item: -item.number
    ):  # what enters a layer gets the gate before it later
        like: dict[str, Any] = {
            "like": min(block.leaves.users), "site": block.path, "part": NodeRole.LAYER_GATES,
        }  # fmt: skip
        noise, alpha, gate = new_gates(editor, 1, like)
        if value(block.leaves).dtype != value(gate).dtype:
            gate = editor.call(aten.to.dtype, gate, value(block.leaves).dtype, **like)
        rest = editor.call(aten.rsub.Scalar, gate, 1.0, **like)
        moved = editor.call(aten.mul.Tensor, block.leaves, gate, **like)
        stayed = editor.call(aten.mul.Tensor, block.enters, rest, **like)
        editor.replace(block.leaves, editor.call(aten.add.Tensor, moved, stayed, **like))
        pairs.append((noise, alpha))
    return pairs[::-1]


def fold_layer_gates(program: Program, context: Context, by: str, wanted: Callable[[str], bool]) -> None:
    """Leave out the layers whose gates are 0, in place, and the gates that are 1; others become constants. Where no gated layer would
    stay, the last does, and adds nothing."""
    layers = [item for item in gated_layers(program) if wanted(item.path)]
    gates = {item.path: evaluate(program, item.gate) for item in layers}
    open_ones = [path for path, gate in gates.items() if bool(gate != 0)]
    kept = set(open_ones or list(gates)[-1:])
    with program.edit(by=by) as editor:
        for item in reversed(layers):
            gate = gates[item.path]
            if item.path not in kept:
                editor.replace(item.node, item.enters)
                context.edited(item.path, "removed: its gate is closed")
            elif bool(gate == 1):
                editor.replace(item.node, item.leaves)
                context.edited(item.path, "kept: its gate is open")
            else:
                for name, product, share in (
                    ("gate", item.node.args[0], gate),
                    ("rest", item.node.args[1], 1 - gate),
                ):
                    assert isinstance(product, fx.Node)
                    constant = editor.parameter(
                        editor.fresh(f"{item.path}_{name}"),
                        share,
                        like=product,
                        frozen=True,
                        part=NodeRole.KEPT,
                    )
                    product.update_arg(1, constant)
                for node in (item.node, *item.node.all_input_nodes):
                    node.meta.pop("part", None)
                context.edited(item.path, f"kept, times {float(gate):.3g}")
