"""Gives what a program computes of positions some positions more in front, of which each row uses the last ones alone.

Masks hide those that it does not use. What depends on distances is right as it is; where tokens read positions themselves (learned
ones, rotary angles), those of a row's text are the ones behind its own prefix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.token_values import TokenValues, reached
from bmgraph.deltas.inserted_values import special_ids
from bmgraph.deltas.longer_positions import FILLS, LongerPositions
from bmgraph.deltas.rows_in_front import RowsInFront
from bmgraph.errors import PassError
from bmgraph.ir.editor import Editor
from bmgraph.ir.input_kind import InputKind
from bmgraph.ir.program import placeholders
from bmgraph.ir.shape_inference import expression

aten = torch.ops.aten


@dataclass(frozen=True)
class Chosen:
    """What rows choose by an input: `used` f[deltas + 1, n] marks the positions that each delta uses; `role` is that of its reader."""

    choice: str
    used: torch.Tensor
    role: str


class RowPositions(LongerPositions):
    """Copies of the values of positions, with as many more in front as a row may use."""

    def __init__(self, editor: Editor, tokens: TokenValues, count: int, chosen: Chosen) -> None:
        super().__init__(editor, tokens, count)
        self.choice = placeholders(self.graph)[chosen.choice]
        name = editor.fresh(f"{tokens.source.target}_deltas_prefix_used")
        used = editor.parameter(name, chosen.used, frozen=True, part=chosen.role)
        used.meta["site"] = str(tokens.source.target)
        self._front = RowsInFront(self.at_start, self.choice, tokens.source, used)
        self._by_row = reached(self.graph, set(tokens.inputs))
        self._places: fx.Node | None = None
        self._visible: fx.Node | None = None

    def of_text(self, node: fx.Node, like: fx.Node, keep_last: bool = False) -> fx.Node:
        """A value for all n + S positions, cut to the text's; where tokens read it, at the places that each row's text has."""
        if keep_last or node in self._by_row:
            return super().of_text(node, like, keep_last)
        axes = self.tokens.axes(node)
        sizes = [expression(size) for size in node.meta["val"].shape]
        rows = expression(self.tokens.source.meta["val"].shape[0])
        if len(axes) != 1 or (axes[0] and sizes[0] not in (1, rows)):
            raise PassError(
                f"in {like.meta.get('scope') or like.name} tokens read positions as {sizes}: where rows choose prefixes of other "
                "lengths, these must be along one axis, behind that of the batch"
            )
        if all(size == 1 for size in sizes[: axes[0]]):
            return self._looked_up(node, axes[0], like)
        return self._moved(node, axes[0], like)

    def _looked_up(self, node: fx.Node, axis: int, like: fx.Node) -> fx.Node:
        """Positions [1, ..., n + S, ...] as a table that the text's are looked up in."""
        value = self.longer(node)
        for _ in range(axis):
            value = self.insert(aten.select.int, value, 0, 0, like=like)
        value = self.insert(aten.index.Tensor, value, [self._text()], like=like)
        for _ in range(like.meta["val"].dim() - value.meta["val"].dim()):
            value = self.insert(aten.unsqueeze.default, value, 1, like=like)
        return value

    def _moved(self, node: fx.Node, axis: int, like: fx.Node) -> fx.Node:
        """Positions [1 or B, ..., n + S, ...] of each row."""
        order = list(range(node.meta["val"].dim()))
        order[1], order[axis] = order[axis], order[1]
        value, choice = self.longer(node), [self._front.rows, self._text()]
        if node.meta["val"].shape[0] == 1:
            count = self.insert(aten.sym_size.int, self.tokens.source, 0, like=like)
            value = self.insert(aten.expand.default, value, [count, *[-1] * (len(order) - 1)], like=like)
        if axis == 1:
            return self.insert(aten.index.Tensor, value, choice, like=like)
        value = self.insert(aten.permute.default, value, order, like=like)
        return self.insert(
            aten.permute.default, self.insert(aten.index.Tensor, value, choice, like=like), order, like=like
        )

    def _text(self) -> fx.Node:
        """The positions of each row's text, i64[B, S]."""
        if self._places is None:
            size = self.at_start(aten.sym_size.int, self.tokens.source, self.tokens.axis)
            self._places = self.at_start(
                aten.add.Tensor, self.at_start(aten.arange.default, size), self._front.counts
            )
        return self._places

    def visible(self) -> fx.Node:
        """bool[B, 1, 1, n + S]: the keys of each row's own prefix, and those of the text."""
        if self._visible is None:
            source: fx.Node = self.tokens.source
            for _ in range(source.meta["val"].dim() - 2):
                source = self.at_start(aten.select.int, source, -1, 0)
            text = self.at_start(aten.ge.Scalar, self.at_start(aten.zeros_like.default, source), 0)
            keys = self.at_start(aten.cat.default, [self._used(), text], 1)
            for axis in (1, 1):
                keys = self.at_start(aten.unsqueeze.default, keys, axis)
            self._visible = keys
        return self._visible

    def hides_itself(self, mask: fx.Node) -> bool:
        """Whether a mask is made of an input that marks what is hidden: then it hides what a row does not use."""
        kinds = {spec.name: spec.kind for spec in self.editor.program.inputs}
        masks = {node for node in self.tokens.inputs if kinds[str(node.target)] in FILLS}
        return mask in reached(self.graph, masks)

    def with_used_alone(self, mask: fx.Node | None, like: fx.Node) -> fx.Node:
        """A mask [..., S, n + S] that hides also what a row does not use of its prefix."""
        if mask is None:
            return self.visible()
        if mask.meta["val"].dtype is torch.bool:
            return self.insert(aten.logical_and.default, self.visible(), mask, like=like)
        least = torch.finfo(mask.meta["val"].dtype).min
        return self.insert(aten.masked_fill.Scalar, mask, self._hidden(like), least, like=like)

    def hide_unused(self, softmax: fx.Node, read: Iterable[fx.Node]) -> None:
        """Hide what a row does not use of its prefix from written-out scores, unless a mask among what they `read` does."""
        if any(map(self.hides_itself, read)):
            return
        scores = softmax.args[0]
        assert isinstance(scores, fx.Node)
        if scores.meta["val"].dim() != 4:
            raise PassError(
                f"the scores of {softmax.meta.get('scope') or softmax.name} have {scores.meta['val'].dim()} axes and no mask: where rows "
                "choose prefixes of other lengths, they must be [batch, heads, queries, keys]; capture the model with its mask"
            )
        filled = self.insert(aten.masked_fill.Scalar, scores, self._hidden(softmax), -math.inf, like=softmax)
        softmax.update_arg(0, filled)

    def _hidden(self, like: fx.Node) -> fx.Node:
        return self.insert(aten.logical_not.default, self.visible(), like=like)

    def in_front(self, node: fx.Node, kind: InputKind | None, column: fx.Node) -> tuple[fx.Node, fx.Node]:
        """What an input holds at the positions in front, of which each row uses the last, and at those of the text."""
        dtype = node.meta["val"].dtype

        def cast(value: fx.Node) -> fx.Node:
            return self.at_start(aten.to.dtype, value, dtype)

        if kind is InputKind.POSITIONS:
            counted = self.at_start(aten.cumsum.default, cast(self._front.used), 1)
            own = self.at_start(aten.clamp.default, self.at_start(aten.sub.Tensor, counted, 1), 0)
            counts = self._front.counts if dtype is torch.int64 else cast(self._front.counts)
            return own, self.at_start(aten.add.Tensor, node, counts)
        if kind in FILLS:
            used = self._used()
            shown = used if FILLS[kind] else self.at_start(aten.logical_not.default, used)
            return (shown if dtype is torch.bool else cast(shown)), node
        own, text = super().in_front(node, kind, column)
        hidden = special_ids(self.editor.program, node) if kind is InputKind.IDS else set()
        if len(hidden) == 1:  # what else is computed of ids sees no token where a row has none
            other: Any = self.at_start(aten.full_like.default, own, hidden.pop())
            own = self.at_start(aten.where.self, self._used(), own, other)
        return own, text

    def _used(self) -> fx.Node:
        return self.at_start(aten.gt.Scalar, self._front.used, 0)
