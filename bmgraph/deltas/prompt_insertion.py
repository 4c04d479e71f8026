"""Puts a soft prompt in front of an input's embeddings, and lengthens all that runs along the sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.token_values import ids_of
from bmgraph.deltas.inserted_values import (
    inserted_value,
    ordinary_id,
    propagate_longer,
    returned_by,
    shorten,
)
from bmgraph.deltas.soft_prompt import drop_prompt_positions
from bmgraph.errors import PassError
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import PROMPT
from bmgraph.ir.program import Program, output_node, placeholders
from bmgraph.ir.shape_inference import dims

aten = torch.ops.aten


def insert_prompt(program: Program, prompt: torch.Tensor, by: str) -> str:
    """Insert a prompt f[1, tokens, d] after the token embedding and extend the other inputs along the sequence; returns the name of the
    table. Raises PassError where that cannot be done."""
    lookup, source = prompted_lookup(program)
    length, tokens = prompted_length(program, source), int(prompt.shape[1])
    fills = prompted_fills(program, lookup, source, length)
    shorten(program, length, tokens)
    with program.edit(by=by) as editor:
        site = str(lookup.all_input_nodes[0].target)
        reader = editor.parameter(editor.fresh(f"{site}_prompt"), prompt, like=lookup, part=PROMPT)
        reader.meta["site"] = site
        words = looked_up_again(editor, lookup, source, site)
        rows = editor.call(aten.sym_size.int, source, 0, like=lookup, part=PROMPT)
        repeated = editor.call(
            aten.expand.default, reader, [rows, -1, -1], like=lookup, site=site, part=PROMPT
        )
        joined = editor.call(aten.cat.default, [repeated, words], 1, like=lookup, site=site, part=PROMPT)
        editor.replace(lookup, joined)
        for node, fill in fills.items():
            _extend(editor, node, fill, tokens, {words, rows})
    propagate_longer(program)
    with program.edit(by=by) as editor:
        _trim_outputs(editor)
    return site


def prompted_lookup(program: Program) -> tuple[fx.Node, fx.Node]:
    """The token-embedding lookup and the input that it reads: the first use of the largest table."""
    nodes = {node.name: node for node in program.graph.nodes}
    found: list[tuple[int, fx.Node, fx.Node]] = []
    for embedding in find(program).embeddings:
        for use in embedding.uses:
            source = ids_of(nodes[use.node])
            if isinstance(source, fx.Node) and source.op == "placeholder":
                found.append((embedding.rows, nodes[use.node], source))
    if not found:
        raise PassError(
            "no input is looked up in an embedding: there are no token embeddings to prepend a prompt to"
        )
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    _, lookup, source = max(found, key=lambda item: (item[0], -order[item[1]]))
    if lookup.meta["val"].dim() != 3 or source.meta["val"].dim() != 2:
        raise PassError(
            f"{lookup.name} returns {list(dims(program, lookup.meta['val']))}: expected [batch, length, d]"
        )
    return lookup, source


def looked_up_again(editor: Editor, lookup: fx.Node, source: fx.Node, site: str) -> fx.Node:
    """A lookup in the same table whose indices are the input itself, before the lookup."""
    target: Any = lookup.target
    listed = isinstance(lookup.args[1], (list, tuple))
    given = ([source],) if listed else (source, *lookup.args[2:])
    return editor.call(target, lookup.args[0], *given, like=lookup, site=site)


def prompted_length(program: Program, source: fx.Node) -> str:
    """The name of the sequence dimension of the input; raises PassError where it is fixed."""
    spec = next(spec for spec in program.inputs if spec.name == source.target)
    length = spec.shape[1]
    if not isinstance(length, str) or not length.isidentifier():
        raise PassError(f"the length of {spec.name!r} is fixed to {length}: a prompt needs a dynamic length")
    return length


def prompted_fills(
    program: Program, lookup: fx.Node, source: fx.Node, length: str
) -> dict[fx.Node, float | None]:
    """Inputs along the sequence -> their value at inserted positions; None repeats the value of the first position.

    Inserted ids are looked up in no embedding of words: their value only says what else the model computes from ids.
    """
    nodes = placeholders(program.graph)
    fills: dict[fx.Node, float | None] = {}
    for spec in program.inputs:
        if length not in spec.shape:
            continue
        node = nodes[spec.name]
        if len(spec.shape) != 2 or spec.shape[1] != length:
            raise PassError(
                f"input {spec} has more than one value per position: its values at inserted positions are not known"
            )
        if node is source:
            table: Any = lookup.args[0]
            fills[node] = ordinary_id(program, source, int(table.meta["val"].shape[0]))
        else:
            fills[node] = inserted_value(program, spec, node)
    return fills


def _extend(editor: Editor, node: fx.Node, fill: float | None, tokens: int, keep: set[fx.Node]) -> None:
    """Let all users of an input, except `keep`, read it with the inserted positions prepended."""
    value: Any = fill if fill is None or node.meta["val"].is_floating_point() else int(fill)

    def call(target: Any, *args: Any) -> fx.Node:
        made = editor.call(target, *args, like=node, after=chain[-1], part=PROMPT)
        chain.append(made)
        return made

    chain = [node]
    column = call(aten.slice.Tensor, node, 1, 0, 1)
    if value is not None:
        column = call(aten.full_like.default, column, value)
    longer = call(aten.cat.default, [call(aten.expand.default, column, [-1, tokens]), node], 1)
    unchanged = {*chain, *keep}
    node.replace_all_uses_with(longer, delete_user_cb=lambda user: user not in unchanged)


def _trim_outputs(editor: Editor) -> None:
    """Trim every output to the positions of the text."""
    program = editor.program
    returned = list(returned_by(program))
    for index, (spec, node) in enumerate(zip(program.outputs, returned)):
        node = drop_prompt_positions(editor, node)
        if dims(program, node.meta["val"]) != spec.shape:
            found = list(dims(program, node.meta["val"]))
            raise PassError(f"output {spec} became {found}: its positions of the text are not known")
        returned[index] = node
    set_returned(editor.graph, returned)


def set_returned(graph: fx.Graph, returned: list[fx.Node]) -> None:
    """Let a graph return other values for the outputs that a program declares; what it returns behind them stays."""
    output = output_node(graph)
    values: Any = output.args[0]
    output.args = ((*returned, *values[len(returned) :]),)
