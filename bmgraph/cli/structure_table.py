"""Renders a structure as a table and as a tree."""

from __future__ import annotations

from rich.table import Table
from rich.tree import Tree

from bmgraph.analysis.structure.sites import Attention, FeedForward, Structure


def structure_table(structure: Structure) -> Table:
    """One row for each kind of site."""
    table = Table("site", "count", "what", title="structure")
    rows = (
        ("linear", structure.linears, _features(structure)),
        ("attention", structure.attentions, _several({_attention(item) for item in structure.attentions})),
        (
            "feed-forward",
            structure.feedforwards,
            _several({_feedforward(item) for item in structure.feedforwards}),
        ),
        (
            "experts",
            structure.experts,
            _several({f"{item.count} experts, {item.activation}" for item in structure.experts}),
        ),
        ("norm", structure.norms, _several({item.kind for item in structure.norms})),
        (
            "embedding",
            structure.embeddings,
            _several({f"{item.rows}x{item.features}" for item in structure.embeddings}),
        ),
        ("layer", structure.layers, _several({f"{len(stack.layers)} equal" for stack in structure.stacks})),
    )
    for name, sites, what in rows:
        table.add_row(name, str(len(sites)), what)
    return table


def structure_tree(structure: Structure) -> Tree:
    """The stacks with the sites of their first layer, then the sites outside of layers."""
    tree = Tree("model")
    inside: set[str] = set()
    for stack in structure.stacks:
        first = stack.layers[0]
        branch = tree.add(f"{len(stack.layers)} x {first.path or 'layer'}")
        for name in first.sites:
            branch.add(_site(structure, name))
        inside |= {name for layer in stack.layers for name in layer.sites}
    names = [item.name for item in structure.embeddings]
    names += [item.name for item in structure.norms] + [item.name for item in structure.linears]
    outside = [name for name in dict.fromkeys(names) if name not in inside]
    if outside:
        rest = tree.add("outside of layers")
        for name in outside:
            rest.add(_site(structure, name))
    return tree


def _site(structure: Structure, name: str) -> str:
    role = structure.role(name)
    linear = next((item for item in structure.linears if item.name == name), None)
    size = f" {linear.in_features} -> {linear.out_features}" if linear else ""
    return f"{name}  {role or 'norm'}{size}"


def _attention(item: Attention) -> str:
    kind = "cross" if item.cross else {True: "causal", False: "full", None: "masked"}[item.causal]
    heads = f"{item.heads}" if item.heads == item.kv_heads else f"{item.heads}/{item.kv_heads}"
    return f"{kind}, {heads} heads of {item.head_size}"


def _feedforward(item: FeedForward) -> str:
    return f"{'gated ' if item.gated else ''}{item.activation}, {item.features} wide"


def _features(structure: Structure) -> str:
    wrapped = sum(item.wrapped for item in structure.linears)
    return f"{wrapped} behind a weight expression" if wrapped else ""


def _several(texts: set[str]) -> str:
    return "; ".join(sorted(texts))
