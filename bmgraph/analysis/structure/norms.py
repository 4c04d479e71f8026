"""Finds normalizations and embedding tables."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from bmgraph.analysis.structure.linears import module_path, tensors_of, weight_name
from bmgraph.analysis.structure.sites import Embedding, Norm, Use
from bmgraph.analysis.structure.value_origins import Flow, stem
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Lookup
from bmgraph.ops.traits import place_of, traits_of


def norm_name(program: Program, node: fx.Node) -> str:
    """The parameter that names a norm; without a weight its module path, else its node name."""
    position = place_of(node.target, "weight")
    given = position is not None and len(node.args) > position
    weight = node.args[position] if given else node.kwargs.get("weight")  # type: ignore[index]
    if isinstance(weight, fx.Node) and tensors_of(weight):
        return weight_name(program, weight)
    return str(node.meta.get("scope") or node.name)


def find_norms(program: Program, flows: dict[str, Flow]) -> list[Norm]:
    """All norms of all graphs, with their uses."""
    found: dict[str, Norm] = {}
    for graph, flow in flows.items():
        for node in flow.norms:
            name = norm_name(program, node)
            site = found.get(name) or Norm(name, _path(program, name), stem(node), ())
            found[name] = replace(site, uses=(*site.uses, Use(graph, node.name)))
    return list(found.values())


def find_embeddings(program: Program, flows: dict[str, Flow]) -> list[Embedding]:
    """All embedding tables of all graphs, with their uses."""
    found: dict[str, Embedding] = {}
    for graph, flow in flows.items():
        for node in flow.embeddings:
            table = node.args[0]
            assert isinstance(table, fx.Node)
            names = tensors_of(table)
            learned = any(name in program.parameters for name in names)
            # Rotary tables are looked up with `index` too, but are buffers.
            if not names or (traits_of(node).lookup is Lookup.LIST and not learned):
                continue
            name = weight_name(program, table)
            rows, features = table.meta["val"].shape
            site = found.get(name) or Embedding(name, module_path(name), int(rows), int(features), ())
            found[name] = replace(site, uses=(*site.uses, Use(graph, node.name)))
    return list(found.values())


def _path(program: Program, name: str) -> str:
    return module_path(name) if name in program.parameters or name in program.buffers else name
