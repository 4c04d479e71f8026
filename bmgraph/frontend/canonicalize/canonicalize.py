"""The order of the rewrites that bring a captured program to canonical form."""

from __future__ import annotations

from bmgraph.frontend.canonicalize.activation import fold_activations
from bmgraph.frontend.canonicalize.attention import expand_shared_heads, fold_attentions
from bmgraph.frontend.canonicalize.einsum import rewrite_attention_einsums
from bmgraph.frontend.canonicalize.input_dims import read_sizes_from_first_input
from bmgraph.frontend.canonicalize.linear import fold_linears
from bmgraph.frontend.canonicalize.moe import fold_experts
from bmgraph.frontend.canonicalize.random_masks import fold_random_masks
from bmgraph.frontend.canonicalize.rms_norm import fold_norms
from bmgraph.frontend.canonicalize.single_ops import rewrite_single_ops
from bmgraph.frontend.canonicalize.weight_sites import name_weights
from bmgraph.ir.editor import Editor, remove_dead
from bmgraph.ir.program import Program


def canonicalize(program: Program) -> None:
    """Bring a captured program to canonical form, in place.

    The graph then has no device, layout or assertion. `reshape` is the only view that changes sizes. Products with a
    weight are `aten.linear`, those with a stack of expert weights `experts_linear`. A written-out dropout, activation,
    RMS norm or attention is one node. A weight that is a part of a parameter, or computed from parameters, has a site.
    """
    editor = Editor(program)
    rewrite_single_ops(editor)
    fold_random_masks(editor)
    fold_linears(editor)
    fold_experts(editor)
    fold_activations(editor)
    fold_norms(editor)
    rewrite_attention_einsums(editor)
    fold_attentions(editor)
    expand_shared_heads(editor)
    name_weights(editor)
    read_sizes_from_first_input(program)
    remove_dead(program)
