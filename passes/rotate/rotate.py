"""Rotate: multiply hidden states and values of heads by orthogonal matrices that are folded into the weights around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from bmgraph.analysis.interpreter import Observed
from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.structure.residual_stream import hidden_states
from bmgraph.deltas.backbone import backbone_of
from bmgraph.errors import InputError, PassError, VerificationError
from bmgraph.ir.editor import Editor
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import ModelPass
from bmgraph.passes.qat.features import FAKE_QUANTIZED
from bmgraph.passes.rotate.fold import Folding, Turn, fold_stream, give_own
from bmgraph.passes.rotate.inner_plan import InnerPlan, inner_plans
from bmgraph.passes.rotate.orthogonal import has_hadamard, rotation
from bmgraph.passes.rotate.stream_plan import CannotRotateError, StreamPlan, plan_stream
from bmgraph.passes.shrink.sites import SpreadSite
from bmgraph.passes.shrink.stream import stream_sites
from bmgraph.utils.digest import fingerprint
from bmgraph.verify.proof import Proof
from bmgraph.verify.reference_outputs import exact_bound, fitted
from bmgraph.verify.unnamed_changes import TIES

ROTATED = "rotated"
"""Provided by the pass."""


@dataclass(frozen=True, repr=False)
class Rotate(ModelPass):
    """Rotate the channels of hidden states, and the values of heads, so that no channel is far larger than the others.

    A hidden state x becomes x @ Q with an orthogonal Q: what writes to it and what reads it is multiplied by Q along those channels, so
    that outputs stay what they are, up to rounding, and nothing is computed in addition. Weights and biases of norms move into the linears
    that read them; a norm without them commutes with Q if it takes the root of squares (RMSNorm), and LayerNorm does because Q then
    leaves the mean of channels as it is. Between an attention and its output linear the values of each head are multiplied by a matrix of
    the size of a head, and so is what lies between two other linears with nothing but movements in between.

    stream: rotate hidden states. A product with a matrix of their width stands where one cannot be folded: in front of outputs of the
    program, at inputs and tables of positions that are no parameters, and behind the last norm where the head is tied to the embedding,
    so that it stays so; they are not linears, and other passes leave them in floating point. untie: there the head gets a weight of its own instead, which
    pays where `Quantize(embeddings=)` gives each codes of its own anyway. values: rotate the values of heads. seed: of the random signs
    of the matrices, Hadamard's where the size has one (2^k, 12 x 2^k, 20 x 2^k, 36 x 2^k, ...), else random ones.

    A stream is declined where norms with weights stand within it (post-norm), where something that is not linear reads it, or where a
    weight is an expression that another pass made; dropout of hidden states, in training, then drops channels of the rotated ones. Run it before Quantize, Prune and
    deltas, and after Merge, Shrink and Distill. Sources: Ashkboos et al. 2024, QuaRot (arXiv:2404.00456); Ashkboos et al. 2024, SliceGPT
    (arXiv:2401.15024), for the weights of norms.

    Raises PassError where nothing can be rotated, or the program has no weights (meta device); InputError where both kinds are off.

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.passes import Rotate
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.enter, self.norm = torch.nn.Linear(4, 16), torch.nn.RMSNorm(16)
        ...         self.up, self.down, self.leave = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16), torch.nn.Linear(16, 3)
        ...     def forward(self, x):
        ...         x = self.enter(x)
        ...         return self.leave(x + self.down(self.up(self.norm(x)).relu()))
        >>> rotated = bg.Pipeline([Rotate()]).run(bg.capture(Block(), (torch.randn(5, 4),)))
        >>> [edit.what for edit in rotated.history[-1].edits]
        ['16 channels of the hidden state, by a Hadamard matrix']
    """

    provides: ClassVar[frozenset[str]] = frozenset({ROTATED})
    conflicts: ClassVar[frozenset[str]] = frozenset({"quantized", FAKE_QUANTIZED})

    stream: bool = True
    values: bool = True
    untie: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.stream or self.values):
            raise InputError(
                "stream=False and values=False: nothing is left to rotate; leave one of them out"
            )
        if self.untie and not self.stream:
            raise InputError(
                "untie=True with stream=False: heads are untied where the hidden state is rotated alone"
            )

    @property
    def declared(self) -> frozenset[str]:
        """The ties of heads, where they are to go."""
        return self.changes | ({TIES} if self.untie else frozenset())

    def fits(self, program: Program, context: Context) -> bool:
        """Whether something of a program can be rotated."""
        structure = find(program)
        if self.values and inner_plans(program, structure, context, set()):
            return True
        for item in stream_sites(program, structure, context) if self.stream else ():
            try:
                plan_stream(program, structure, item.site.name, item.spread)
            except CannotRotateError:
                continue
            return True
        return False

    def run(self, program: Program, context: Context) -> Program:
        """Plan all rotations on the program as it is, then fold them."""
        if program.device.type == "meta":
            raise PassError(
                "a program on the meta device has no values to fold rotations into: load its weights first"
            )
        structure, folding = find(program), Folding()
        sites = stream_sites(program, structure, context) if self.stream else []
        with program.edit(by=str(self)) as editor:
            plans = []
            for item in sites:
                plan = self._planned(editor, context, item)
                if plan is not None:
                    plans.append(plan)
            taken = {(name, dim) for plan in plans for name, dims in plan.tensors.items() for dim in dims}
            inner = inner_plans(program, structure, context, taken) if self.values else []
            for number, plan in enumerate(plans):
                self._fold_stream(editor, context, plan, folding, self.seed + number)
            for number, pair in enumerate(inner):
                self._fold_inner(context, pair, folding, self.seed + len(plans) + number)
            folding.assign(editor, context)
        if plans or inner:  # a delta that was trained on the weights as they were must be rejected
            program.fingerprint = fingerprint(backbone_of(program))
        return program

    def prove(self, before: Program, after: Program, proof: Proof, context: Context) -> None:
        """All hidden states must have the products with each other that they had: they were rotated, and nothing else."""
        names = [
            state.name
            for states in hidden_states(before)
            for state in states
            if state is not None and traits_of(state).kind is not Kind.NORM
        ]
        names = [name for name in names if name in Observed(after).names]
        batch = proof.reference.batches[0]
        bound = 10 * exact_bound(before)
        was, now = (_products(program, batch, set(names)) for program in (before, after))
        for name in names:
            error = float((now[name] - was[name]).norm() / was[name].norm().clamp(min=1e-30))
            if not error <= bound:
                raise VerificationError(
                    f"the hidden state {name} was not only rotated: its products with itself moved by {error:.1e}"
                )

    def _planned(self, editor: Editor, context: Context, item: SpreadSite) -> StreamPlan | None:
        """How a stream is rotated; None where it is declined."""
        program, name = editor.program, item.site.name
        try:
            plan = plan_stream(program, find(program), name, item.spread)
            if plan.shared and self.untie:
                for read in plan.shared:
                    give_own(editor, read, item.spread)
                plan = plan_stream(program, find(program), name, item.spread)
        except CannotRotateError as reason:
            context.declined(name, f"the hidden state stays as it is: {reason}")
            return None
        return plan

    def _fold_stream(
        self, editor: Editor, context: Context, plan: StreamPlan, folding: Folding, seed: int
    ) -> None:
        products = fold_stream(editor, plan, rotation(plan.width, seed, plan.keeps_mean), folding)
        said = f"{plan.width} channels of the hidden state, by a {_kind(plan.width)} matrix"
        if products:
            said += f"; {products} product{'s' * (products > 1)} of {plan.width} x {plan.width} added"
        changed = [*plan.tensors, *folding.shifts, *folding.whole]
        context.edited(plan.site, said, dict.fromkeys(changed))

    def _fold_inner(self, context: Context, pair: InnerPlan, folding: Folding, seed: int) -> None:
        matrix = rotation(pair.size, seed)
        folding.add(pair.first.site, Turn(pair.first.channel_axis, matrix, pair.given))
        folding.add(pair.second.site, Turn(1 - pair.second.channel_axis, matrix, pair.read))
        tensors = [pair.first.site]
        if pair.bias is not None:
            folding.add(pair.bias, Turn(0, matrix, pair.given))
            tensors.append(pair.bias)
        context.edited(
            pair.second.site,
            f"{len(pair.read)} x {pair.size} values that it reads, by a {_kind(pair.size)} matrix",
            tensors,
        )


def _kind(size: int) -> str:
    return "Hadamard" if has_hadamard(size) else "random"


def _products(
    program: Program, batch: Mapping[str, torch.Tensor], names: set[str]
) -> dict[str, torch.Tensor]:
    """The scalar products of the rows of the first item of values, f64[rows, rows], by node name."""
    found: dict[str, torch.Tensor] = {}

    def visit(name: str, value: torch.Tensor) -> None:
        rows = value.reshape(-1, value.shape[-1])[:64].double()
        found[name] = rows @ rows.T

    Observed(program).run(fitted(batch, program.inputs), names, visit)
    return found
