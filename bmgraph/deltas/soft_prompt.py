"""Soft prompts as they stand in a program: how long they are, and the program and its values without them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.structure.value_origins import base
from bmgraph.ir.editor import Editor
from bmgraph.ir.matching import END
from bmgraph.ir.node_role import PROMPT
from bmgraph.ir.program import Program, tensor_nodes
from bmgraph.ir.shape_inference import dims, propagate, shape
from bmgraph.lowering.to_exported_program import trim

aten = torch.ops.aten


def prompt_of(program: Program) -> fx.Node | None:
    """What reads the embeddings [1, tokens, d] of a prompt; None for a program without one."""
    return next((node for node in tensor_nodes(program.graph).values() if _is_inserted(node)), None)


def prompt_length(program: Program) -> int:
    """The number of positions that a prompt inserts; 0 without one."""
    prompt = prompt_of(program)
    return 0 if prompt is None else int(shape(prompt)[1])


def prompted_input(program: Program) -> str | None:
    """The input whose words a prompt stands in front of; None for a program without one."""
    prompt = prompt_of(program)
    if prompt is None:
        return None
    joined: Any = next(user for repeated in prompt.users for user in repeated.users if _is_joined(user))
    sources = [base(item) for item in joined.args[0][-1].all_input_nodes]
    return next(str(item.target) for item in sources if item.op == "placeholder")


def behind_prompt(editor: Editor, node: fx.Node) -> fx.Node:
    """A value for the positions of the text alone; the value itself where nothing was inserted into it."""
    tokens = prompt_length(editor.program)
    named = {size for spec in editor.program.inputs for size in spec.shape if isinstance(size, str)}
    longer = {f"{name} + {tokens}" for name in named} if tokens else set()
    for axis, size in enumerate(dims(editor.program, node.meta["val"])):
        if size in longer:
            node = editor.call(aten.slice.Tensor, node, axis, tokens, END, like=node, after=node, part=PROMPT)
    return node


def without_prompt(program: Program) -> Program:
    """The program of the text alone, its nodes under the names that they have; it takes texts that are `tokens` longer."""
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


def _is_inserted(node: fx.Node) -> bool:
    return node.meta.get("part") == PROMPT


def _is_joined(node: fx.Node) -> bool:
    """Whether a node puts inserted positions in front of those of the text, its last."""
    return _is_inserted(node) and node.target is aten.cat.default
