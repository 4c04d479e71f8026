"""Gives the decoder behind an encoder a mask of its own positions where it has none: rows of different lengths may then run together."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bmgraph.analysis.structure.value_origins import Core
from bmgraph.ir.editor import Editor, unused_name
from bmgraph.ir.input_kind import InputKind
from bmgraph.ir.program import Program
from bmgraph.passes.kvcache.input_names import ROW_MASK
from bmgraph.passes.kvcache.sequence_roles import SequenceRoles, find_sequence_roles

aten = torch.ops.aten

MASK, CAUSAL = 3, 5
"""Indices of the mask and of the flag `is_causal` among the arguments of scaled_dot_product_attention."""


def with_row_mask(program: Program, roles: SequenceRoles, by: str) -> tuple[Program, SequenceRoles]:
    """A decoder that reads memories and takes no mask as one that takes a mask i64[B, S] of its positions, whose zeros hide keys; any
    other as it is. `roles` are the program's, and those of the result come back."""
    if not roles.memories or roles.masks:
        return program, roles
    masked = program.clone()
    copies = {node.name: node for node in masked.graph.nodes}
    tokens = copies[roles.tokens.name]
    name = unused_name({spec.name for spec in masked.inputs}, ROW_MASK)
    example = torch.ones_like(masked.example[str(tokens.target)])
    with masked.edit(by=by) as editor:
        mask = editor.input(name, example, tuple(tokens.meta["val"].shape), kind=InputKind.MASK)
        hiding = _Hiding(editor, mask)
        for core in roles.cores:
            if not hiding.hide(core, copies):
                return program, roles
    found = find_sequence_roles(masked)
    return (masked, found) if found.masks else (program, roles)


class _Hiding:
    """Lets attentions read no key where `mask` is zero."""

    def __init__(self, editor: Editor, mask: fx.Node) -> None:
        self._editor, self._mask = editor, mask
        self._seen: fx.Node | None = None
        self._made: dict[fx.Node | None, fx.Node] = {}

    def hide(self, core: Core, copies: dict[str, fx.Node]) -> bool:
        """Do so for an attention, whose nodes have `copies`; returns whether it has a form that allows it."""
        node = copies[core.node.name]
        if core.scores is not None:
            if core.softmax is None:
                return False
            node = copies[core.softmax.name]
            scores: Any = node.args[0]
            if scores.meta["val"].dim() != 4:
                return False
            node.args = (self._of_scores(scores, node), *node.args[1:])
            return True
        args = list(node.args)
        kwargs = dict(node.kwargs)
        given: Any = args[MASK] if len(args) > MASK else kwargs.pop("attn_mask", None)
        causal = bool(args[CAUSAL] if len(args) > CAUSAL else kwargs.pop("is_causal", False))
        if node.meta["val"].dim() != 4 or (given is None and not causal):
            return False
        dropout = args[MASK + 1] if len(args) > MASK + 1 else kwargs.pop("dropout_p", 0.0)
        if given not in self._made:
            self._made[given] = self._combined(given, node)
        node.args = (*args[:MASK], self._made[given], dropout, False, *args[CAUSAL + 1 :])
        node.kwargs = kwargs
        return True

    def _combined(self, given: fx.Node | None, node: fx.Node) -> fx.Node:
        """A mask or bias of an attention, None for a causal one, with what is hidden."""
        editor = self._editor
        if given is None:
            count = editor.call(aten.sym_size.int, self._mask, 1, like=node)
            positions = editor.call(aten.arange.default, count, like=node)
            queries = editor.call(aten.unsqueeze.default, positions, 1, like=node)
            given = editor.call(aten.ge.Tensor, queries, positions, like=node)
        if given.meta["val"].dtype == torch.bool:
            return editor.call(aten.logical_and.default, given, self._seen_keys(node), like=node)
        return self._of_scores(given, node)

    def _of_scores(self, scores: fx.Node, node: fx.Node) -> fx.Node:
        """What is added to scores, or scores, f[..., S, S], with the least number where a key is hidden."""
        editor = self._editor
        hidden = editor.call(aten.logical_not.default, self._seen_keys(node), like=node)
        least = torch.finfo(scores.meta["val"].dtype).min
        return editor.call(aten.masked_fill.Scalar, scores, hidden, least, like=node)

    def _seen_keys(self, node: fx.Node) -> fx.Node:
        """bool[B, 1, 1, S], made before the first attention that reads it."""
        if self._seen is None:
            editor = self._editor
            seen = editor.call(aten.ne.Scalar, self._mask, 0, like=node)
            for _ in range(2):
                seen = editor.call(aten.unsqueeze.default, seen, 1, like=node)
            self._seen = seen
        return self._seen
