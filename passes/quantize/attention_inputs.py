"""Rounded queries and keys: attention whose first product is one of integers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from bmgraph.analysis.structure.finder import find
from bmgraph.ir.editor import Editor
from bmgraph.ir.eval_form import in_eval
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of
from bmgraph.pass_manager.context import Context
from bmgraph.passes.quantize.round_inputs import Grid, Range, rounded_to
from bmgraph.verify.metrics import relative_error

aten = torch.ops.aten

PASSED = frozenset({aten.transpose.int, aten.permute.default})
"""Calls between what is rounded and the attention, beside reshapes: rounding in front of them is the same, and one linear's."""


@dataclass(frozen=True)
class _Operand:
    """Queries or keys of an attention: the value to round, its reader on the way to the attention, and the weight it is named after."""

    value: fx.Node
    reader: fx.Node
    site: str

    @property
    def name(self) -> str:
        """The name of the value in eval form."""
        return in_eval(self.value).name


@dataclass
class AttentionInputs:
    """The queries and keys of attentions whose projections are quantized; attentions without projections have none.

    `errors`: by name, the largest relative error (L2) of its rounding on what `visit` was
    shown; `measured` comes before.
    """

    pairs: tuple[tuple[_Operand, _Operand], ...] = ()
    grids: dict[str, Grid] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program, quantized: Collection[str]) -> AttentionInputs:
        """Those of a program; `quantized` are the weights that are."""
        nodes = {node.name: node for node in program.graph.nodes}
        pairs = []
        for attention in find(program).attentions:
            if attention.q is None or attention.k is None:
                continue
            sites = (attention.q.linear, attention.k.linear)
            if not set(sites) <= set(quantized):
                continue
            for use in attention.uses:
                node = nodes.get(use.node)
                if use.graph == program.entry and node is not None and traits_of(node).kind is Kind.ATTENTION:
                    query, key = (_operand(node, place, site) for place, site in enumerate(sites))
                    pairs.append((query, key))
        return cls(tuple(pairs))

    @property
    def names(self) -> set[str]:
        """The names of the values in eval form."""
        return {item.name for pair in self.pairs for item in pair}

    def measured(self, ranges: Mapping[str, Range]) -> None:
        """Take the grids that cover ranges, around 0: kernels multiply s8 alone."""
        self.grids = {name: ranges[name].grid(symmetric=True) for name in self.names}

    def visit(self, name: str, value: torch.Tensor) -> None:
        """Measure what rounding changes of a value, if it is one of these."""
        if name in self.grids:
            error = relative_error(self.grids[name].rounded(value), value)
            self.errors[name] = max(self.errors.get(name, 0.0), error)

    def apply(self, editor: Editor, context: Context, quantized: Collection[str], bound: float) -> None:
        """Round the queries and keys of the attentions whose projections are `quantized`, where that changes them by at most
        `bound`; the others are declined."""
        for pair in self.pairs:
            sites = [item.site for item in pair]
            if not set(sites) <= set(quantized):
                continue
            worst = max(self.errors.get(item.name, 0.0) for item in pair)
            if not worst <= bound:
                context.declined(
                    sites[0],
                    f"queries and keys of its attention would change by {worst:.3f} (relative), more than {bound:g}",
                )
                continue
            for item in dict.fromkeys(pair):
                new = rounded_to(editor, item.value, self.grids[item.name], item.reader, item.site)
                item.reader.replace_input_with(item.value, new)
            context.edited(sites[0], "queries and keys of its attention, s8", sites[1:])


def _operand(attention: fx.Node, place: int, site: str) -> _Operand:
    """An argument of an attention, or what it is a reshape of, as far as nothing else reads that."""
    reader, value = attention, attention.args[place]
    assert isinstance(value, fx.Node)
    while len(value.users) == 1 and (traits_of(value).kind is Kind.RESHAPE or value.target in PASSED):
        source = value.args[0]
        assert isinstance(source, fx.Node)
        reader, value = value, source
    return _Operand(value, reader, site)
