"""Gives a decoder that was captured with labels an input of its own ids: it makes them by shifting the labels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.interpreter import Observed
from bmgraph.ir.input_kind import InputKind
from bmgraph.ir.program import Program, output_node, placeholders
from bmgraph.lowering.to_exported_program import trim
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of

aten = torch.ops.aten

DECODER_IDS = "decoder_input_ids"
"""Name of the input that replaces the labels."""


def with_decoder_ids(program: Program) -> Program:
    """A program without losses in which the shifted labels are an input; the program itself where no labels are shifted.

    Labels are shifted where what an embedding looks up is `[start, label 0, label 1, ...]`, tried with random labels, and
    nothing else depends on the labels' values. The input takes ids i64[B, S] from the start on.
    """
    for node in program.graph.nodes:
        if traits_of(node).kind is Kind.EMBEDDING and _is_computed(node.args[1]):
            labels = _source(program, node.args[1])
            if labels is not None and _shifts(program, labels, node.args[1], int(_shape(node.args[0])[0])):
                return _with_input(program, labels, node.args[1])
    return program


def _is_computed(ids: Any) -> bool:
    return isinstance(ids, fx.Node) and ids.op == "call_function" and len(_shape(ids)) == 2


def _shape(node: Any) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _source(program: Program, ids: fx.Node) -> fx.Node | None:
    """The one input of the shape of `ids` whose values reach the outputs through `ids` alone; None without one."""
    candidates = []
    for node in placeholders(program.graph).values():
        value = node.meta["val"]
        if value.is_floating_point() or value.dtype is torch.bool or _shape(node) != _shape(ids):
            continue
        reached = {node}
        for item in program.graph.nodes:
            if item.target is aten.sym_size.int or item is ids:
                continue
            if any(argument in reached for argument in item.all_input_nodes):
                reached.add(item)
        if output_node(program.graph) not in reached and reached & set(ids.all_input_nodes):
            candidates.append(node)
    return candidates[0] if len(candidates) == 1 else None


def _shifts(program: Program, labels: fx.Node, ids: fx.Node, rows: int) -> bool:
    """Whether `ids` are the labels moved by one position behind one start id; tried with random labels."""
    name = str(labels.target)
    if program.device.type == "meta" or name not in program.example:
        return False
    example = program.example[name]
    generator = torch.Generator().manual_seed(0)
    tried = torch.randint(rows, example.shape, generator=generator).to(example)
    found = _evaluated(program, {**program.example, name: tried}, ids)
    return (
        found.shape == tried.shape
        and bool((found[:, :1] == found[0, 0]).all())
        and torch.equal(found[:, 1:], tried[:, :-1])
    )


def _evaluated(program: Program, batch: dict[str, torch.Tensor], node: fx.Node) -> torch.Tensor:
    values: list[torch.Tensor] = []

    def visit(name: str, value: torch.Tensor) -> None:
        values.append(value.clone())

    Observed(program).run(batch, {node.name}, visit)
    return values[0]


def _with_input(program: Program, labels: fx.Node, ids: fx.Node) -> Program:
    example = _evaluated(program, program.example, ids)
    changed = program.clone()
    if changed.generation.start is None:
        changed.generation = replace(changed.generation, start=int(example[0, 0]))
    nodes = {node.name: node for node in changed.graph.nodes}
    old = nodes[ids.name]
    with changed.edit() as editor:
        new = editor.input(DECODER_IDS, example, _shape(old), kind=InputKind.IDS)
        old.replace_all_uses_with(new)
        for node in changed.graph.nodes:
            if node.target is aten.sym_size.int and node.args[0] is nodes[labels.name]:
                node.args = (new, *node.args[1:])
    trim(changed)
    return changed
