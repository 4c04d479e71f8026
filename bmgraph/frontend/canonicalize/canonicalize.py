"""The order in which a captured graph is brought to its normal form."""

from __future__ import annotations

from bmgraph.frontend.canonicalize.activation import fold_activations
from bmgraph.frontend.canonicalize.attention import fold_attentions, spread_heads
from bmgraph.frontend.canonicalize.input_dims import read_sizes_from_first
from bmgraph.frontend.canonicalize.linear import fold_linears
from bmgraph.frontend.canonicalize.moe import fold_experts
from bmgraph.frontend.canonicalize.rms_norm import fold_norms
from bmgraph.frontend.canonicalize.single_ops import rewrite_calls
from bmgraph.ir.editor import Editor, remove_dead
from bmgraph.ir.program import FORWARD, Program


def normalize(program: Program) -> None:
    """Bring a captured program to its normal form, in place.

    No device, layout or assertion is left; sizes are changed by `reshape` alone; projections are `aten.linear`, those of
    chosen experts `experts_linear`; written-out activations, norms and attentions are one node each.
    """
    editor = Editor(program, FORWARD)
    rewrite_calls(editor)
    fold_linears(editor)
    fold_experts(editor)
    fold_activations(editor)
    fold_norms(editor)
    fold_attentions(editor)
    spread_heads(editor)
    read_sizes_from_first(program)
    remove_dead(program)
