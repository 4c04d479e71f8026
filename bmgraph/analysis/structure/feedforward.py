"""Feed-forwards, plain and gated: an activation between two products."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from bmgraph.analysis.structure.linears import linear_name, part_of
from bmgraph.analysis.structure.partial_evaluation import Region
from bmgraph.analysis.structure.sites import FeedForward, Part, Use
from bmgraph.analysis.structure.value_origins import SOFTMAX, Flow, Origin, base, products
from bmgraph.ir.program import Program


def find_feedforwards(program: Program, region: Region, flows: dict[str, Flow]) -> list[FeedForward]:
    """Every `down(activation(up(x)))` and `down(activation(gate(x)) * up(x))` that gives as many features as x has."""
    found: dict[tuple[str, str], FeedForward] = {}
    for graph, flow in flows.items():
        known = set(flow.linears)
        for down in flow.linears:
            made = _feedforward(program, region, flow, known, down)
            if made is None:
                continue
            before = found.get((made.up.linear, made.down))
            use = Use(graph, down.name)
            found[made.up.linear, made.down] = replace(made, uses=(*(before.uses if before else ()), use))
    return list(found.values())


def shape_of(
    origin: Origin | None, known: set[fx.Node]
) -> tuple[tuple[fx.Node, fx.Node | None], tuple[fx.Node, fx.Node | None] | None, str] | None:
    """(up, gate, activation) of what enters the last product, None where it is no feed-forward."""
    if not origin or any(node not in known for node, _ in origin) or SOFTMAX in origin.values():
        return None
    active = [key for key, flag in origin.items() if flag]
    silent = [key for key, flag in origin.items() if not flag]
    if len(active) != 1 or len(silent) > 1:
        return None
    gate, activation = active[0], origin[active[0]]
    return (silent[0], gate, activation) if silent else (gate, None, activation)


def _feedforward(
    program: Program, region: Region, flow: Flow, known: set[fx.Node], down: fx.Node
) -> FeedForward | None:
    x = down.args[0]
    assert isinstance(x, fx.Node)
    shape = shape_of(flow.origins[x], known)
    if shape is None:
        return None
    up, gate, activation = shape
    entrances = [node for node in products(flow.origins[x]) if node.args]
    if len({base(node.args[0]) for node in entrances}) != 1:
        return None
    if up[0].args[1].meta["val"].shape[-1] != down.meta["val"].shape[-1]:  # type: ignore[union-attr]
        return None
    fused = gate is not None and gate[0] is up[0]
    if fused and (up[1] is None or gate is None or gate[1] is None):
        return None
    return FeedForward(
        path=_common(linear_name(program, up[0]), linear_name(program, down)),
        up=_part(program, region, up, fused),
        down=linear_name(program, down),
        gate=_part(program, region, gate, fused) if gate is not None else None,
        activation=activation,
        uses=(),
    )


def _part(program: Program, region: Region, key: tuple[fx.Node, fx.Node | None], fused: bool) -> Part:
    return part_of(program, region, key[0], key[1] if fused else None)


def _common(a: str, b: str) -> str:
    """The innermost module that holds both parameters."""
    shared = []
    for one, other in zip(a.split(".")[:-1], b.split(".")[:-1]):
        if one != other:
            break
        shared.append(one)
    return ".".join(shared)
