"""Finds feed-forwards, plain and gated."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from bmgraph.analysis.structure.linears import linear_name, part_of
from bmgraph.analysis.structure.partial_evaluation import PartialEvaluator
from bmgraph.analysis.structure.sites import FeedForward, Part, Use
from bmgraph.analysis.structure.value_origins import SOFTMAX, Flow, Origin, base, products
from bmgraph.ir.program import Program


def find_feedforwards(
    program: Program, evaluator: PartialEvaluator, flows: dict[str, Flow]
) -> list[FeedForward]:
    """Find every `down(activation(up(x)))` and `down(activation(gate(x)) * up(x))` with as many outputs as x has features."""
    found: dict[tuple[str, str], FeedForward] = {}
    for graph, flow in flows.items():
        linears = set(flow.linears)
        for down in flow.linears:
            site = _feedforward(program, evaluator, flow, linears, down)
            if site is None:
                continue
            previous = found.get((site.up.linear, site.down))
            use = Use(graph, down.name)
            found[site.up.linear, site.down] = replace(site, uses=(*(previous.uses if previous else ()), use))
    return list(found.values())


def shape_of(
    origin: Origin | None, linears: set[fx.Node]
) -> tuple[tuple[fx.Node, fx.Node | None], tuple[fx.Node, fx.Node | None] | None, str] | None:
    """(up, gate, activation) from the origin of the input of `down`; None if that is not a feed-forward."""
    if not origin or any(node not in linears for node, _ in origin) or SOFTMAX in origin.values():
        return None
    active = [key for key, flag in origin.items() if flag]
    plain = [key for key, flag in origin.items() if not flag]
    if len(active) != 1 or len(plain) > 1:
        return None
    gate, activation = active[0], origin[active[0]]
    return (plain[0], gate, activation) if plain else (gate, None, activation)


def _feedforward(
    program: Program, evaluator: PartialEvaluator, flow: Flow, linears: set[fx.Node], down: fx.Node
) -> FeedForward | None:
    x = down.args[0]
    assert isinstance(x, fx.Node)
    shape = shape_of(flow.origins[x], linears)
    if shape is None:
        return None
    up, gate, activation = shape
    first_products = [node for node in products(flow.origins[x]) if node.args]
    if len({base(node.args[0]) for node in first_products}) != 1:
        return None
    if up[0].args[1].meta["val"].shape[-1] != down.meta["val"].shape[-1]:  # type: ignore[union-attr]
        return None
    fused = gate is not None and gate[0] is up[0]
    if fused and (up[1] is None or gate is None or gate[1] is None):
        return None
    return FeedForward(
        path=_common_module(linear_name(program, up[0]), linear_name(program, down)),
        up=_part(program, evaluator, up, fused),
        down=linear_name(program, down),
        gate=_part(program, evaluator, gate, fused) if gate is not None else None,
        activation=activation,
        uses=(),
    )


def _part(
    program: Program, evaluator: PartialEvaluator, key: tuple[fx.Node, fx.Node | None], fused: bool
) -> Part:
    """The outputs of a linear: those that the split gives if gate and up are fused, else all."""
    return part_of(program, evaluator, key[0], key[1] if fused else None)


def _common_module(a: str, b: str) -> str:
    """The innermost module that contains both parameters."""
    shared = []
    for one, other in zip(a.split(".")[:-1], b.split(".")[:-1]):
        if one != other:
            break
        shared.append(one)
    return ".".join(shared)
