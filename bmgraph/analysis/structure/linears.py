"""Linears: products with weights, whatever expression the weight is."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from bmgraph.analysis.structure.partial_evaluation import Region
from bmgraph.analysis.structure.sites import Linear, Part, Use
from bmgraph.analysis.structure.value_origins import Flow, stem
from bmgraph.ir.program import Program


def find_linears(program: Program, flows: dict[str, Flow]) -> dict[str, Linear]:
    """The linears of all graphs by the name of their weight, with all their uses."""
    found: dict[str, Linear] = {}
    for graph, flow in flows.items():
        for node in flow.linears:
            made = _linear(program, graph, node)
            before = found.get(made.name)
            if before is not None:
                made = replace(before, uses=(*before.uses, *made.uses))
            found[made.name] = made
    return found


def linear_name(program: Program, node: fx.Node) -> str:
    """The parameter that a linear is named after."""
    return weight_name(program, node.args[1])  # type: ignore[arg-type]


def weight_name(program: Program, weight: fx.Node) -> str:
    """The parameter that an expression stands for: the site that a pass stamped on it, else its largest parameter."""
    behind = weight
    while behind.op == "call_function" and stem(behind) in ("t", "transpose", "permute", "to"):
        behind = behind.args[0]  # type: ignore[assignment]
    site = behind.meta.get("site")
    if site:
        return str(site)
    names = tensors_of(weight)
    sizes = [program.tensor(name).numel() for name in names]
    return names[sizes.index(max(sizes))]


def tensors_of(node: fx.Node | None) -> list[str]:
    """The parameters and buffers that an expression reads, in order."""
    names: list[str] = []
    seen: set[fx.Node] = set()
    stack = [node] if node is not None else []
    while stack:
        item = stack.pop(0)
        if item in seen:
            continue
        seen.add(item)
        if item.op == "get_attr":
            names.append(str(item.target))
        stack.extend(item.all_input_nodes)
    return names


def module_path(name: str) -> str:
    """The module of a parameter."""
    return name.rpartition(".")[0]


def part_of(program: Program, region: Region, linear: fx.Node, taken: fx.Node | None) -> Part:
    """The outputs of a linear that reach `taken`; all of them where it is None."""
    name = linear_name(program, linear)
    size = int(linear.meta["val"].shape[-1])
    runs = None if taken is None else _runs(region, linear, taken)
    return Part(name, runs or ((0, size),))


def _runs(region: Region, linear: fx.Node, taken: fx.Node) -> tuple[tuple[int, int], ...] | None:
    """Read from a gradient: an output that reaches a value is one that the value changes with."""
    try:
        leaf = region.leaf(linear).requires_grad_()
    except ValueError:
        return None
    with torch.enable_grad():
        value = region.value(taken, {linear: leaf})
        if value is None or not value.requires_grad:
            return None
        noise = torch.rand(value.shape, generator=torch.Generator().manual_seed(1)) + 0.5
        (gradient,) = torch.autograd.grad((value * noise).sum(), leaf)
    rows = (gradient.reshape(-1, gradient.shape[-1]) != 0).any(0).nonzero().flatten().tolist()
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return tuple(runs) or None


def _linear(program: Program, graph: str, node: fx.Node) -> Linear:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    transposed = weight.op == "call_function" and stem(weight) == "t"
    behind = weight.args[0] if transposed else weight
    assert isinstance(behind, fx.Node)
    name = weight_name(program, weight)
    rows, columns = weight.meta["val"].shape
    biases = tensors_of(bias) if isinstance(bias, fx.Node) else []
    return Linear(
        name=name,
        path=module_path(name),
        uses=(Use(graph, node.name),),
        in_features=int(columns),
        out_features=int(rows),
        bias=biases[0] if biases else None,
        tensors=tuple(dict.fromkeys((*tensors_of(weight), *biases))),
        wrapped=behind.op != "get_attr",
        transposed=transposed,
    )
