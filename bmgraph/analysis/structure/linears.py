"""Finds linears, names them, and tells which of their outputs reach a value."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from bmgraph.analysis.structure.partial_evaluation import PartialEvaluator
from bmgraph.analysis.structure.sites import Linear, Part, Use
from bmgraph.analysis.structure.value_origins import Flow
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Dims, Kind
from bmgraph.ops.traits import calls, traits_of


def find_linears(program: Program, flows: dict[str, Flow]) -> dict[str, Linear]:
    """Name of the weight -> linear with all its uses, over all graphs."""
    found: dict[str, Linear] = {}
    for graph, flow in flows.items():
        for node in flow.linears:
            site = _linear(program, graph, node)
            previous = found.get(site.name)
            if previous is not None:
                site = replace(previous, uses=(*previous.uses, *site.uses))
            found[site.name] = site
    return found


def linear_name(program: Program, node: fx.Node) -> str:
    """The parameter that names a linear."""
    return weight_name(program, node.args[1])  # type: ignore[arg-type]


def weight_name(program: Program, weight: fx.Node) -> str:
    """The parameter that names a weight expression: the site recorded on it by a pass, else its largest tensor."""
    stored = weight
    while traits_of(stored).dims is Dims.PERMUTED or traits_of(stored).kind is Kind.CAST:
        stored = stored.args[0]  # type: ignore[assignment]
    site = stored.meta.get("site")
    if site:
        return str(site)
    names = tensors_of(weight)
    sizes = [program.tensor(name).numel() for name in names]
    return names[sizes.index(max(sizes))]


def tensors_of(node: fx.Node | None) -> list[str]:
    """The parameters and buffers that an expression reads, nearest first."""
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
    """Module path of a parameter: its name without the last component."""
    return name.rpartition(".")[0]


def part_of(program: Program, evaluator: PartialEvaluator, linear: fx.Node, taken: fx.Node | None) -> Part:
    """The outputs of a linear that reach the value `taken`; all of them if `taken` is None or cannot be evaluated."""
    name = linear_name(program, linear)
    size = int(linear.meta["val"].shape[-1])
    runs = None if taken is None else _runs(evaluator, linear, taken)
    return Part(name, runs or ((0, size),))


def _runs(evaluator: PartialEvaluator, linear: fx.Node, taken: fx.Node) -> tuple[tuple[int, int], ...] | None:
    """Ranges of outputs that reach `taken`: those where its gradient is not zero. None if it cannot be evaluated."""
    try:
        leaf = evaluator.leaf(linear).requires_grad_()
    except ValueError:
        return None
    with torch.enable_grad():
        value = evaluator.value(taken, {linear: leaf})
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
    """The site of one linear node, with this one use."""
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    transposed = calls(weight, torch.ops.aten.t)
    stored = weight.args[0] if transposed else weight
    assert isinstance(stored, fx.Node)
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
        wrapped=stored.op != "get_attr",
        transposed=transposed,
    )
