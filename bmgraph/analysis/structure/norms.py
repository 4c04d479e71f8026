"""Norms and embeddings."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from bmgraph.analysis.structure.linears import module_path, tensors_of, weight_name
from bmgraph.analysis.structure.sites import Embedding, Norm, Use
from bmgraph.analysis.structure.value_origins import Flow, stem
from bmgraph.ir.program import Program

WEIGHTS = {"layer_norm": 2, "rms_norm": 2, "group_norm": 2, "batch_norm": 1, "instance_norm": 1}
"""Norm -> the place of its weight among its arguments."""


def norm_name(program: Program, node: fx.Node) -> str:
    """The parameter that a norm is named after; its module path, or its own name, where it has none."""
    place = WEIGHTS[stem(node)]
    weight = node.args[place] if len(node.args) > place else node.kwargs.get("weight")
    if isinstance(weight, fx.Node) and tensors_of(weight):
        return weight_name(program, weight)
    return str(node.meta.get("scope") or node.name)


def find_norms(program: Program, flows: dict[str, Flow]) -> list[Norm]:
    """The norms of all graphs."""
    found: dict[str, Norm] = {}
    for graph, flow in flows.items():
        for node in flow.norms:
            name = norm_name(program, node)
            before = found.get(name) or Norm(name, _path(program, name), stem(node), ())
            found[name] = replace(before, uses=(*before.uses, Use(graph, node.name)))
    return list(found.values())


def find_embeddings(program: Program, flows: dict[str, Flow]) -> list[Embedding]:
    """The tables of all graphs."""
    found: dict[str, Embedding] = {}
    for graph, flow in flows.items():
        for node in flow.embeddings:
            table = node.args[0]
            assert isinstance(table, fx.Node)
            names = tensors_of(table)
            learned = any(name in program.parameters for name in names)
            if not names or (
                stem(node) == "index" and not learned
            ):  # rotary tables are looked up by index too
                continue
            name = weight_name(program, table)
            rows, features = table.meta["val"].shape
            before = found.get(name) or Embedding(name, module_path(name), int(rows), int(features), ())
            found[name] = replace(before, uses=(*before.uses, Use(graph, node.name)))
    return list(found.values())


def _path(program: Program, name: str) -> str:
    return module_path(name) if name in program.parameters or name in program.buffers else name
