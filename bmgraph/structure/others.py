"""Norms, embeddings, experts, and runs of equal layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bmgraph.observe import of_parameters_alone
from bmgraph.program import Program
from bmgraph.structure.sites import Attention, Embedding, Experts, FeedForward, Layers, Linear, Norm
from bmgraph.structure.trace import NORMS, SHAPES, upwards

aten = torch.ops.aten

PRODUCTS = (aten.bmm.default, aten.matmul.default)
LONGEST_BLOCK = 6
"""The most sites that a block of a run of equal layers may have."""


def find_norms(program: Program) -> tuple[Norm, ...]:
    """Every norm, once for each weight."""
    found: dict[str, Norm] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in NORMS:
            weight = _parameter(program, node)
            kind = node.target._schema.name.split("::")[1]
            found.setdefault(
                weight or node.name, Norm(weight or node.name, str(node.meta.get("scope", "")), kind)
            )
    return tuple(found.values())


def _parameter(program: Program, node: fx.Node) -> str:
    """The first vector of parameters that a norm reads, behind any expression."""
    for argument in node.args[1:4]:
        if isinstance(argument, fx.Node) and of_parameters_alone(argument):
            stack = [argument]
            while stack:
                item = stack.pop()
                if item.op == "get_attr":
                    return str(item.target)
                stack.extend(item.all_input_nodes)
    return ""


def find_embeddings(program: Program) -> tuple[Embedding, ...]:
    """Every table that is looked up, once."""
    found: dict[str, Embedding] = {}
    for node in program.graph.nodes:
        if node.target is aten.embedding.default:
            table = node.args[0]
            assert isinstance(table, fx.Node)
            site = str(table.target) if table.op == "get_attr" else str(table.meta.get("site", table.name))
            rows, size = table.meta["val"].shape
            found.setdefault(site, Embedding(site, site.removesuffix(".weight"), int(rows), int(size)))
    return tuple(found.values())


def find_experts(program: Program) -> tuple[Experts, ...]:
    """Every parameter [experts, ..., ...] whose matrices are multiplied with."""
    found: dict[str, Experts] = {}
    tables = {node for node in program.graph.nodes if node.op == "get_attr" and node.meta["val"].dim() == 3}
    tables = {node for node in tables if str(node.target) in program.parameters}
    through = SHAPES | frozenset({aten.index.Tensor, aten.index_select.default})
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in PRODUCTS:
            for argument in node.args:
                for table in upwards(argument, through, lambda item: item in tables).found:
                    site = str(table.target)
                    found.setdefault(
                        site, Experts(site, site.rpartition(".")[0], int(table.meta["val"].shape[0]))
                    )
    return tuple(found.values())


def find_layers(
    program: Program,
    linears: tuple[Linear, ...],
    attentions: tuple[Attention, ...],
    feedforwards: tuple[FeedForward, ...],
) -> tuple[Layers, ...]:
    """Runs of blocks of equal attentions and feed-forwards, the longest first block winning."""
    order = {node.name: index for index, node in enumerate(program.graph.nodes)}
    first_use = {linear.site: order[linear.uses[0]] for linear in linears if linear.uses[0] in order}
    items: list[tuple[int, Any, str]] = [
        (
            order[item.node],
            ("attention", item.heads, item.kv_heads, item.head_size, item.causal, item.cross),
            item.path,
        )
        for item in attentions
    ]
    items += [
        (
            first_use.get(item.down, len(order)),
            ("feedforward", item.size, item.gated, item.activation),
            item.path,
        )
        for item in feedforwards
    ]
    items.sort(key=lambda item: item[0])
    signatures, paths = [item[1] for item in items], [item[2] for item in items]
    found, position = [], 0
    while position < len(items):
        length, count = _longest_run(signatures, position)
        if count > 1:
            blocks = tuple(
                tuple(paths[position + i * length : position + (i + 1) * length]) for i in range(count)
            )
            found.append(Layers(count, blocks))
        position += length * count
    return tuple(found)


def _longest_run(signatures: list[Any], start: int) -> tuple[int, int]:
    """The block length and number of repetitions, from `start`, that cover the most."""
    best = (1, 1)
    for length in range(1, LONGEST_BLOCK + 1):
        block = signatures[start : start + length]
        if len(block) < length:
            break
        count = 1
        while signatures[start + count * length : start + (count + 1) * length] == block:
            count += 1
        if count > 1 and length * count > best[0] * best[1]:
            best = (length, count)
    return best
