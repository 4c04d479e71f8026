"""Relufy: ReLU in the place of other activations of feed-forwards, and recovery by distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from bmgraph.analysis.site_filter import matches, resolve_patterns
from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.structure.residual_stream import hidden_states
from bmgraph.analysis.structure.unknown_sites import NEURONS, unknown_sites
from bmgraph.errors import InputError, VerificationError
from bmgraph.ir.editor import Editor
from bmgraph.ir.evaluation import run_call
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.passes.distill.distill import HIDDEN, LOGITS, OUTPUTS, Distill
from bmgraph.passes.moefy.ffn_neurons import FeedForwardUse, NotSplittable, feedforward_uses
from bmgraph.verify.kept_calls import check_kept_calls
from bmgraph.verify.proof import Proof

aten = torch.ops.aten

BEFORE = "before relufy"
"""The resource that holds the program before the pass, as the teacher."""

BELOW = (-100.0, -10.0, -3.0, -1.0, -0.5, -0.1, -0.01)
"""Where an activation is zero that does not need the pass."""


@dataclass(frozen=True, repr=False)
class Relufy(ModelPass):
    """Put ReLU in the place of the activations of feed-forwards (GELU, SiLU, ...; the gate's, where there is one), and train all
    parameters that are not frozen, for `steps` steps, to match the program before on the batches of `data`.

    Most neurons of a ReLU are zero for a token, so that `MoEfy` behind this pass keeps more with fewer experts active.
    Activations that are zero for all negative inputs already are declined. With steps=0 activations alone are changed, for
    training of your own.

    data: name of a resource: batches, repeated where there are fewer than `steps`. teacher: name of a resource, another teacher than
    the program before. on: what is matched, as in `Distill`; by default logits, or all outputs where none is called so, and
    hidden states where layers are found. include, exclude: globs over the module paths of first linears (of up). The resource
    "trainer" sets the optimizer, as in `Distill`.

    Raises PassError where no activation is to be changed, ResourceError where a batch cannot be used.
    Sources: Zhang et al. 2022 (MoEfication, arXiv:2110.01786) and Mirzadeh et al. 2023 (ReLU Strikes Back, arXiv:2310.04564),
    which train on with the loss of language modelling.

    Example:
        >>> from bmgraph.passes import Relufy
        >>> Relufy(data="text", steps=500)
        relufy{steps=500}
    """

    effect: ClassVar[Effect] = "intended"
    changes: ClassVar[frozenset[str]] = frozenset({"tensors"})
    provides: ClassVar[frozenset[str]] = frozenset({"relufied"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"moefied", "quantized"})
    trains: ClassVar[bool] = True

    data: str = "text"
    steps: int = 200
    on: tuple[str, ...] = ()
    teacher: str | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 0:
            raise InputError(f"steps={self.steps}: give a number of steps, or 0 to change activations alone")
        if self.steps:
            self._distill(self.on or (OUTPUTS,))  # which checks on

    @property
    def resources(self) -> tuple[str, ...]:
        """The training data, and another teacher."""
        if not self.steps:
            return ()
        return (self.data, *([self.teacher] if self.teacher else []))

    def fits(self, program: Program, context: Context) -> bool:
        """Whether a feed-forward is found."""
        return bool(find(program).feedforwards)

    def run(self, program: Program, context: Context) -> Program:
        """Change the activations; then train, in passes within this one."""
        if not self.steps:
            return self._changed(program, context)
        before = program.clone()
        program = context.run(replace(self, steps=0, on=(), teacher=None), program)
        changed = program.history[-1]
        given: Mapping[str, object] = {} if self.teacher else {BEFORE: before}
        program = context.run(self._distill(self.on or _matched(program)), program, given)
        trained = program.history[-1]
        for edit in changed.edits:
            context.edited(edit.site, edit.what)
        for edit in trained.edits:
            context.edited(edit.site, edit.what)
        for edit in changed.declined:
            context.declined(edit.site, edit.what)
        context.digests |= {
            name: digest for name, digest in trained.resources.items() if name in self.resources
        }
        return program

    def prove(self, before: Program, after: Program, proof: Proof, context: Context) -> None:
        """The calls that are made are ReLUs, and casts, of what the activation read; all others are kept."""
        if self.steps:
            return  # the passes within have proved their work
        check_kept_calls(before, after, str(self))
        for node in after.graph.nodes:
            if node.meta.get("pass") == str(self) and node.target not in (aten.relu.default, aten.to.dtype):
                raise VerificationError(f"{node.name} is {node.target}, and no ReLU")

    def _distill(self, on: tuple[str, ...]) -> Distill:
        return Distill(self.teacher or BEFORE, self.data, self.steps, on, seed=self.seed)

    def _changed(self, program: Program, context: Context) -> Program:
        structure = find(program)
        names = [feedforward.up.linear for feedforward in structure.feedforwards]
        include = resolve_patterns(self.include, names, "include")
        exclude = resolve_patterns(self.exclude, names, "exclude")
        with program.edit(by=str(self)) as editor:
            for feedforward in structure.feedforwards:
                name = feedforward.up.linear
                if not matches(name, include) or matches(name, exclude):
                    continue
                try:
                    found = [_activation(use) for use in feedforward_uses(program, feedforward)]
                except NotSplittable as reason:
                    context.declined(name, str(reason))
                    continue
                if all(is_zero for _, _, is_zero in found):
                    context.declined(
                        name, f"its activation ({feedforward.activation}) is zero for negative inputs already"
                    )
                    continue
                for source, end, _ in found:
                    _replace(editor, source, end, name)
                context.edited(name, f"{feedforward.activation} is ReLU")
        for name, unknown in unknown_sites(program, structure).items():
            if unknown.kind == NEURONS and matches(name, include) and not matches(name, exclude):
                context.declined(name, unknown.why)
        for group in structure.experts:
            if matches(group.up, include) and not matches(group.up, exclude):
                context.declined(group.up, "it is a mixture of experts, which are sparse already")
        return program


def _matched(program: Program) -> tuple[str, ...]:
    """What is matched by default."""
    outputs = LOGITS if any(spec.name.split(".")[-1] == LOGITS for spec in program.outputs) else OUTPUTS
    states = hidden_states(program)
    return (outputs, HIDDEN) if states and all(map(all, states)) else (outputs,)


def _activation(use: FeedForwardUse) -> tuple[fx.Node, fx.Node, bool]:
    """What the activation reads, the call that ends it, and whether it is zero for negative inputs.

    The activation is all that is computed from the first projection alone (the gate's, where there is one), but casts,
    dropout and rounding at its end. Raises NotSplittable where nothing is.
    """
    source = use.projections[0].value
    alone = {source}
    region: list[fx.Node] = []
    for node in use.elementwise:
        if all(item in alone or item.op == "get_attr" for item in node.all_input_nodes):
            alone.add(node)
            region.append(node)
    while region and traits_of(region[-1]).kind in (Kind.DROPOUT, Kind.ROUNDING, Kind.CAST):
        region.pop()
    if not region:
        raise NotSplittable("its activation is not found")
    return source, region[-1], _is_zero_below(source, region)


def _is_zero_below(source: fx.Node, region: list[fx.Node]) -> bool:
    """Whether the calls in `region` give 0 for negative values of `source`; not where they read anything else."""
    values: dict[fx.Node, Any] = {source: torch.tensor(BELOW, dtype=source.meta["val"].dtype)}
    for node in region:
        if not all(item in values for item in node.all_input_nodes):
            return False
        values[node] = run_call(node, values.__getitem__)
    return bool((values[region[-1]] == 0).all())


def _replace(editor: Editor, source: fx.Node, end: fx.Node, site: str) -> None:
    """Let all that reads the activation read ReLU of what it reads."""
    made = editor.call(aten.relu.default, source, like=end, site=site)
    dtype = end.meta["val"].dtype
    if source.meta["val"].dtype != dtype:
        made = editor.call(aten.to.dtype, made, dtype, like=end, site=site)
    end.replace_all_uses_with(made)
