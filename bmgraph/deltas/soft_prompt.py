"""Finds the soft prompt of a program, and undoes it: for one value, or for the whole program."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.structure.value_origins import base
from bmgraph.ir.editor import Editor
from bmgraph.ir.matching import END
from bmgraph.ir.node_role import PROMPT, has_role
from bmgraph.ir.program import Program, tensor_nodes
from bmgraph.ir.shape_inference import dims, propagate, shape
from bmgraph.lowering.to_exported_program import trim

aten = torch.ops.aten


def prompt_of(program: Program) -> fx.Node | None:
    """The node that reads the prompt's embeddings [1, tokens, d]; None without a prompt."""
    return prompt_in(program.graph)


def prompt_length(program: Program) -> int:
    """Number of positions that the prompt inserts; 0 without a prompt."""
    prompt = prompt_of(program)
    return 0 if prompt is None else int(shape(prompt)[1])


def prompted_input(program: Program) -> str | None:
    """Name of the input whose embeddings the prompt precedes; None without a prompt."""
    prompt = prompt_of(program)
    if prompt is None:
        return None
    joined: Any = joined_with(prompt)
    sources = [base(item) for item in joined.args[0][-1].all_input_nodes]
    return next(str(item.target) for item in sources if item.op == "placeholder")


def drop_prompt_positions(editor: Editor, node: fx.Node) -> fx.Node:
    """The value without the prompt's positions: a slice inserted after `node`, or `node` itself if it has none."""
    tokens = prompt_length(editor.program)
    named = {size for spec in editor.program.inputs for size in spec.shape if isinstance(size, str)}
    longer = {f"{name} + {tokens}" for name in named} if tokens else set()
    for axis, size in enumerate(dims(editor.program, node.meta["val"])):
        if size in longer:
            node = editor.call(aten.slice.Tensor, node, axis, tokens, END, like=node, after=node, part=PROMPT)
    return node


def without_prompt(program: Program) -> Program:
    """A copy of the program without its prompt. Node names stay; the longest text grows by the prompt's length."""
    source, tokens = prompted_input(program), prompt_length(program)
    bare = program.clone()
    length = next(spec.shape[1] for spec in program.inputs if spec.name == source)
    for node in list(bare.graph.nodes):
        if _is_joined(node):
            node.replace_all_uses_with(node.args[0][-1])
        elif _is_inserted(node) and node.target is aten.slice.Tensor and node.args[2:] == (tokens, END):
            node.replace_all_uses_with(node.args[0])
    bounds = bare.ranges.get(str(length))
    if bounds is not None and bounds.high is not None:
        bare.ranges = {**bare.ranges, str(length): replace(bounds, high=bounds.high + tokens)}
    trim(bare)
    propagate(bare, everything=True)
    return bare


def prompt_in(graph: fx.Graph) -> fx.Node | None:
    """The node that reads the embeddings of the prompt of a graph; None without one."""
    return next((node for node in tensor_nodes(graph).values() if _is_inserted(node)), None)


def joined_with(prompt: fx.Node) -> fx.Node | None:
    """The concatenation of the prompt's embeddings with those of the text."""
    users = (user for repeated in prompt.users for user in repeated.users)
    return next((user for user in users if _is_joined(user)), None)


def _is_inserted(node: fx.Node) -> bool:
    return has_role(node, PROMPT)


def _is_joined(node: fx.Node) -> bool:
    """Whether a node concatenates inserted positions with those of the text, its last operand."""
    return _is_inserted(node) and node.target is aten.cat.default
