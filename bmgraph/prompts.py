"""Soft prompts as they stand in a program: how long they are, and values without the positions that they inserted."""

from __future__ import annotations

import torch
from torch import fx

from bmgraph.editor import Editor
from bmgraph.metadata import dims, shape
from bmgraph.parts import PROMPT
from bmgraph.program import Program

aten = torch.ops.aten

END = 2**63 - 1
"""Where a slice ends that takes all that follows."""


def prompt_of(program: Program) -> fx.Node | None:
    """What reads the embeddings [1, tokens, d] of a prompt; None for a program without one."""
    for node in program.graph.nodes:
        if node.op == "get_attr" and node.meta.get("part") == PROMPT:
            return node  # type: ignore[no-any-return]
    return None


def behind_prompt(editor: Editor, node: fx.Node) -> fx.Node:
    """A value for the positions of the text alone; the value itself where nothing was inserted into it."""
    program, prompt = editor.program, prompt_of(editor.program)
    if prompt is None:
        return node
    tokens = int(shape(prompt)[1])
    longer = {f"{name} + {tokens}" for name in program.ranges}
    for axis, size in enumerate(dims(program, node.meta["val"])):
        if size in longer:
            node = editor.call(aten.slice.Tensor, node, axis, tokens, END, like=node, after=node, part=PROMPT)
    return node
