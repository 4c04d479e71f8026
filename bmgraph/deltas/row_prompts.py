"""Puts a soft prompt of its own in front of each row's embeddings, of several of other lengths or none.

Behind a row's prompt comes its text at once, and behind that what is left of the room: each row is what the program with its prompt
alone computes, with padding behind. So positions, and what else the model makes of them, are those of that program.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.structure.finder import find
from bmgraph.deltas.inserted_values import propagate_longer, returned_by, shorten, special_ids
from bmgraph.deltas.prompt_insertion import (
    looked_up_again,
    prompted_fills,
    prompted_length,
    prompted_lookup,
    set_returned,
)
from bmgraph.deltas.rows_in_front import RowsInFront
from bmgraph.errors import PassError
from bmgraph.ir.editor import Editor
from bmgraph.ir.input_kind import MASKS, InputKind
from bmgraph.ir.matching import END
from bmgraph.ir.node_role import PROMPT, delta_role, has_role, role_of
from bmgraph.ir.program import Program, placeholders, tensor_nodes
from bmgraph.ir.shape_inference import dims, propagate
from bmgraph.lowering.to_exported_program import trim

aten = torch.ops.aten

VECTORS, USED, COMPUTED, KEPT = (
    delta_role(f"prompt_{end}") for end in ("vectors", "used", "computed", "kept")
)
"""Roles of what reads tables: embeddings, which of them a delta uses; keys and values computed of them, and which of these it uses."""


def insert_row_prompts(
    program: Program, choice: str, prompts: torch.Tensor, used: torch.Tensor, by: str
) -> str:
    """Insert prompts f[deltas + 1, P, d] after the token embedding, of which row i gets the entry `choice[i]`, as long as `used`
    [deltas + 1, P] says; returns the name of the table of words. Raises PassError where that cannot be done."""
    lookup, source = prompted_lookup(program)
    length, tokens = prompted_length(program, source), int(prompts.shape[1])
    fills = prompted_fills(program, lookup, source, length)
    _check_hides(program, fills)
    hidden = special_ids(program, source)
    shorten(program, length, tokens)
    with program.edit(by=by) as editor:
        site = str(lookup.all_input_nodes[0].target)
        rows = _Rows(editor, choice, source, site, used)
        vectors = rows.table("prompt", prompts, VECTORS)
        words = looked_up_again(editor, lookup, source, site)
        own = rows.after(words, aten.index_select.default, vectors, 0, rows.choice)
        dtype = words.meta["val"].dtype
        if prompts.dtype != dtype:
            own = rows.after(own, aten.to.dtype, own, dtype)
        joined = rows.after(own, aten.cat.default, [own, words], 1)
        placed = rows.after(joined, aten.index.Tensor, joined, [rows.front.rows, rows.places])
        lookup.replace_all_uses_with(placed, delete_user_cb=lambda user: user is not words)
        for node, fill in fills.items():
            behind = next(iter(hidden)) if node is source and len(hidden) == 1 else None
            rows.extend(node, fill, behind, {words, *rows.sizes})
    propagate_longer(program)
    with program.edit(by=by) as editor:
        _cut_outputs(editor, rows, length, tokens)
    return site


def _check_hides(program: Program, fills: dict[fx.Node, float | None]) -> None:
    """Raise PassError where attentions see what is behind a row's text: without a mask, and not causal."""
    kinds = {spec.name: spec.kind for spec in program.inputs}
    if any(kinds[str(node.target)] in MASKS for node in fills):
        return
    for attention in find(program).attentions:
        if attention.causal is False and not attention.cross:
            raise PassError(
                f"{attention.path or 'an attention'} sees all positions, and the model takes no mask: behind the text of a row with a "
                "shorter prompt something would be seen; capture the model with its attention mask"
            )


class _Rows:
    """Adds the nodes of prompts that rows choose."""

    def __init__(self, editor: Editor, choice: str, source: fx.Node, site: str, used: torch.Tensor) -> None:
        self._editor, self._source, self._site = editor, source, site
        self._first = next(node for node in editor.graph.nodes if node.op == "call_function")
        self.choice = placeholders(editor.graph)[choice]
        self.sizes: list[fx.Node] = []
        """The nodes that read the text's own sizes."""
        self._room = int(used.shape[1])
        self.front = RowsInFront(self._at_start, self.choice, source, self.table("prompt_used", used, USED))
        size = self._at_start(aten.sym_size.int, source, 1)
        total = self._at_start(aten.arange.default, self._at_start(operator.add, size, self._room))
        behind = self._at_start(
            aten.sub.Tensor, self._at_start(aten.add.Tensor, total, self._room), self.front.counts
        )
        last = self._at_start(aten.slice.Tensor, total, 0, -1, END)
        self._tail = self._at_start(aten.gt.Tensor, behind, last)
        ahead = self._at_start(aten.lt.Tensor, total, self.front.counts)
        behind = self._at_start(aten.minimum.default, behind, last)
        self.places = self._at_start(aten.where.self, ahead, total, behind)
        """Where the P + S positions of each row come from, among P in front and S of text, i64[B, P + S]."""

    def table(self, end: str, value: torch.Tensor, role: str) -> fx.Node:
        """The node that reads a new table."""
        name = self._editor.fresh(f"{self._site}_deltas_{end}")
        node = self._editor.parameter(name, value, frozen=True, part=role)
        node.meta["site"] = self._site
        return node

    def after(self, node: fx.Node, target: Any, *args: Any) -> fx.Node:
        """Add a call of the prompt behind a node."""
        return self._editor.call(target, *args, like=node, after=node, site=self._site, part=PROMPT)

    def _at_start(self, target: Any, *args: Any) -> fx.Node:
        made = self._editor.call(
            target, *args, like=self._source, before=self._first, site=self._site, part=PROMPT
        )
        if target is aten.sym_size.int and args[0] is self._source:
            self.sizes.append(made)
        return made

    def places_of_text(self, editor: Editor) -> fx.Node:
        """The places of each row's text, i64[B, S], made by an editor that knows the longer shapes."""
        first = next(node for node in self.front.counts.users)
        size = editor.call(aten.sym_size.int, self._source, 1, like=self._source, before=first, part=PROMPT)
        own = editor.call(aten.arange.default, size, like=self._source, before=first, part=PROMPT)
        return editor.call(
            aten.add.Tensor, own, self.front.counts, like=self._source, before=first, part=PROMPT
        )

    def extend(self, node: fx.Node, fill: float | None, behind: int | None, keep: set[fx.Node]) -> None:
        """Let all users of an input, except `keep`, read it with the positions in front and behind that each row has.

        `fill` is its value in front, None for that of the first position; `behind` that behind the text, None for the last one. What
        is behind is hidden by a mask.
        """
        spec = next(spec for spec in self._editor.program.inputs if spec.name == node.target)
        value: Any = fill if fill is None or node.meta["val"].is_floating_point() else int(fill)
        old = set(node.users) - keep
        column = self._at_start(aten.slice.Tensor, node, 1, 0, 1)
        if value is not None:
            column = self._at_start(aten.full_like.default, column, value)
        front = self._at_start(aten.expand.default, column, [-1, self._room])
        longer = self._at_start(aten.cat.default, [front, node], 1)
        placed = self._at_start(aten.index.Tensor, longer, [self.front.rows, self.places])
        if spec.kind in MASKS:
            behind = int(spec.kind is InputKind.INVERSE_MASK)
        elif spec.kind is InputKind.LABELS:
            behind = value
        if behind is not None:
            held = self._at_start(aten.full_like.default, placed, behind)
            placed = self._at_start(aten.where.self, self._tail, held, placed)
        node.replace_all_uses_with(placed, delete_user_cb=lambda user: user in old)


def _cut_outputs(editor: Editor, rows: _Rows, length: str, tokens: int) -> None:
    """Let every output have the positions of the text alone, which each row has at its own places."""
    program = editor.program
    places = rows.places_of_text(editor)
    returned = list(returned_by(program))
    for index, (spec, node) in enumerate(zip(program.outputs, returned)):
        sizes = dims(program, node.meta["val"])
        for axis, size in enumerate(sizes):
            if size != f"{length} + {tokens}":
                continue
            if axis == 0 or sizes[0] != dims(program, rows.choice.meta["val"])[0]:
                raise PassError(
                    f"output {spec} has positions along axis {axis}, and the rows of the batch not along its first one: its positions "
                    "of the text are not known"
                )
            node = _at_places(editor, node, axis, [rows.front.rows, places])
        if dims(program, node.meta["val"]) != spec.shape:
            found = list(dims(program, node.meta["val"]))
            raise PassError(f"output {spec} became {found}: its positions of the text are not known")
        returned[index] = node
    set_returned(editor.graph, returned)


def _at_places(editor: Editor, node: fx.Node, axis: int, places: list[fx.Node]) -> fx.Node:
    """A value [B, ..., P + S, ...] at the places of each row's text along an axis."""
    order = list(range(node.meta["val"].dim()))
    order[1], order[axis] = order[axis], order[1]

    def call(target: Any, value: fx.Node, given: Any) -> fx.Node:
        return editor.call(target, value, given, like=value, after=value, part=PROMPT)

    if axis == 1:
        return call(aten.index.Tensor, node, places)
    moved = call(aten.permute.default, node, order)
    return call(aten.permute.default, call(aten.index.Tensor, moved, places), order)


def has_row_prompts(graph: fx.Graph) -> bool:
    """Whether rows of a graph choose among soft prompts."""
    return any(role_of(node) == USED for node in tensor_nodes(graph).values())


def without_row_prompts(program: Program) -> tuple[Program, fx.Node, str, str]:
    """A copy without the prompts that rows choose, whose names of nodes stay; the reader of what they use, in the program; the input
    that chooses; and the input that the prompts are in front of."""
    tables = {role_of(node): node for node in tensor_nodes(program.graph).values()}
    used = tables[USED]
    (chosen,) = used.users
    choice: Any = chosen.args[2]
    tokens, bare = int(used.meta["val"].shape[1]), program.clone()
    for node in list(bare.graph.nodes):
        if not has_role(node, PROMPT):
            continue
        value: Any = node.args[0] if node.target is aten.index.Tensor else None
        if node.target is aten.where.self:
            value = node.args[2]
        elif value is not None and has_role(value, PROMPT) and value.target is aten.cat.default:
            value = value.args[0][-1]
        if value is not None:
            node.replace_all_uses_with(value)
    source = next(
        node
        for node in placeholders(program.graph).values()
        if any(user.target is aten.sym_size.int and has_role(user, PROMPT) for user in node.users)
    )
    length = str(next(spec.shape[1] for spec in program.inputs if spec.name == source.target))
    bounds = bare.ranges.get(length)
    if bounds is not None and bounds.high is not None:
        bare.ranges = {**bare.ranges, length: replace(bounds, high=bounds.high + tokens)}
    trim(bare)
    propagate(bare, everything=True)
    return bare, used, str(choice.target), str(source.target)
