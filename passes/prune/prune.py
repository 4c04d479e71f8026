"""Prune: N:M and unstructured sparsity, by masks on the weights of linears."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.site_filter import matches, resolve_patterns
from bmgraph.analysis.weight_sites import Weight, linears, read_elsewhere, unnamed_weights, weight_of
from bmgraph.errors import InputError, PassError, VerificationError
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import NodeRole
from bmgraph.ir.program import Program
from bmgraph.ir.step_rules import MaskSchedule
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.layer_calibration import LayerPart
from bmgraph.pass_manager.layer_sites import InputSums, LayerSites, Sites
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.passes.prune.patterns import (
    LARGEST_TRANSPOSABLE,
    UNSTRUCTURED,
    lowest_of_all,
    lowest_share,
    parse_pattern,
    sparsity_mask,
    transposable_mask,
)
from bmgraph.passes.prune.scores import FUNCTIONS, MAGNITUDE, SCORES, SPARSEGPT, WANDA
from bmgraph.passes.prune.sparsegpt import BLOCK, sparsegpt
from bmgraph.utils.stored_tensor import in_memory
from bmgraph.verify.measures import Measure, OutputsMoved, WeightsMoved
from bmgraph.verify.proof import Proof

aten = torch.ops.aten

SCOPES = ("row", "layer", "global")

OUTPUT_BOUND = 0.95
"""Largest relative error of the outputs of a site that calibrated pruning may leave: 1 is that of no output at all."""


@dataclass(frozen=True, repr=False)
class Prune(ModelPass):
    """Zero the weights with the lowest score: in every group of consecutive inputs of an output, or a share of all.

    pattern: "N:M" keeps N of every M consecutive input weights, "unstructured" drops the share `sparsity`. score: "magnitude" (the
    absolute value), "wanda" (times the norm of its input), "sparsegpt" (what dropping it costs, after which the weights that
    are kept make up for it); the last two read calibration data, layer by layer. scope: among what an unstructured share is
    taken, "row" (the weights of an output), "layer" (of a linear) or "global" (of all linears, by magnitude alone); by default
    "row" for wanda, as in its paper, else "layer". transposable: N:M in every block of M x M along both axes, for M up to 4.
    include, exclude: globs over module paths.

    end: above 0, the masks grow while the program trains (`trainer.fit`, `Distill`), by the magnitudes that the weights have then:
    after steps `begin`, `begin + every`, ..., `end` the share of zeros is s + (i - s) (1 - (step - begin) / (end - begin))^3, from
    `initial` i to the final s, as Zhu and Gupta have it (2017, arXiv:1710.01878); of an N:M pattern N falls from M. It never falls,
    so that later training leaves the masks alone. Checkpoints hold the masks, and their schedule goes on where it was.

    A weight becomes `w * mask` with a frozen bool mask: zeros stay zero in training, under a delta, and when the weight
    is quantized before or after. Engines store only the product; none of today's targets computes it faster. SparseGPT also
    changes the weights that it keeps, and declines those that are made of codes. Linears whose sizes do not fit the pattern, and
    weights that another operator reads too (tied embeddings), are declined.

    The N largest of M weights hold at least N/M of the sum of squares, so by magnitude no row changes by more than sqrt(1 - N/M)
    (relative L2), and the pipeline enforces this bound; of calibrated scores it bounds the outputs of each linear. The
    outputs of the model can drift far unless it is trained afterwards.

    Raises PassError where a glob matches nothing or no site is left, ResourceError without calibration data where the score
    reads it. Source: Mishra et al. 2021 (arXiv:2104.08378); those of the scores in `scores.py`.

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.passes import Prune
        >>> program = bg.capture(torch.nn.Linear(8, 4), (torch.randn(3, 8),))
        >>> pruned = bg.Pipeline([Prune()]).run(program)
        >>> pruned.parameters["weight_mask"].sum(1).tolist()
        [4, 4, 4, 4]
        >>> batches = [{"input": torch.randn(64, 8)}]
        >>> pruned = bg.Pipeline([Prune("unstructured", score="wanda", sparsity=0.25)]).run(program, calibration=batches)
        >>> pruned.parameters["weight_mask"].sum(1).tolist()
        [6, 6, 6, 6]
    """

    effect: ClassVar[Effect] = "approximate"
    provides: ClassVar[frozenset[str]] = frozenset({"pruned"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"pruned"})
    default_drift: ClassVar[float] = 1.5
    saves: ClassVar[bool] = True

    pattern: str = "2:4"
    score: str = MAGNITUDE
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    sparsity: float = 0.5
    scope: str = ""
    transposable: bool = False
    initial: float = field(default=0.0, kw_only=True)
    begin: int = field(default=0, kw_only=True)
    end: int = field(default=0, kw_only=True)
    every: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        groups = parse_pattern(self.pattern)
        if self.score not in SCORES:
            raise InputError(f"score={self.score!r}: choose one of {', '.join(SCORES)}")
        if not 0 < self.sparsity < 1:
            raise InputError(f"sparsity={self.sparsity}: give the share of zeros, above 0 and below 1")
        if self.scope and (groups is not None or self.scope not in SCOPES):
            raise InputError(
                f"scope={self.scope!r}: for pattern={UNSTRUCTURED!r}, choose one of {', '.join(SCOPES)}"
            )
        if self.scope == "global" and self.score != MAGNITUDE:
            raise InputError(
                f"scope='global' is for score={MAGNITUDE!r}: scores that read inputs are not of one scale in all linears"
            )
        if self.scope == "row" and self.score == SPARSEGPT:
            raise InputError(
                f"scope='row': {SPARSEGPT} compares the weights of {BLOCK} columns: leave scope out"
            )
        if self.transposable and (
            groups is None or groups[1] > LARGEST_TRANSPOSABLE or self.score == SPARSEGPT
        ):
            raise InputError(
                f"transposable: give a pattern N:M with M up to {LARGEST_TRANSPOSABLE}, and {MAGNITUDE} or {WANDA} as score"
            )

        self._check_schedule()

    def _check_schedule(self) -> None:
        """Raise InputError for a schedule that is none, or that these masks cannot have."""
        if not self.end:
            if self.begin or self.initial or self.every != 1:
                raise InputError(
                    "begin=, every= and initial= are of a schedule: give end=, the step that it ends at"
                )
            return
        if not 0 <= self.begin < self.end or self.every < 1:
            raise InputError(
                f"begin={self.begin}, end={self.end}, every={self.every}: give steps with begin before end, and every of 1 or more"
            )
        if self.score != MAGNITUDE or self.transposable:
            raise InputError(f"end=: masks that grow in training are by {MAGNITUDE}, and not transposable")
        if not 0 <= self.initial < self._final or (self.initial and self._groups):
            raise InputError(
                f"initial={self.initial}: give a share of zeros below {self._final:g}, for pattern={UNSTRUCTURED!r} alone"
            )

    @property
    def _groups(self) -> tuple[int, int] | None:
        return parse_pattern(self.pattern)

    @property
    def _final(self) -> float:
        """The share of zeros in the end."""
        return self.sparsity if self._groups is None else 1 - self._groups[0] / self._groups[1]

    @property
    def measured(self) -> Measure:
        """By magnitude no weight loses more of its sum of squares than its pattern drops at most; by other scores no site's output
        is lost."""
        if self.score != MAGNITUDE:
            return OutputsMoved(OUTPUT_BOUND)
        groups = parse_pattern(self.pattern)
        if groups is None or self.transposable:
            return WeightsMoved(1.0)
        return WeightsMoved(math.sqrt(1 - groups[0] / groups[1]) + 1e-4)

    def fits(self, program: Program, context: Context) -> bool:
        """Whether a linear has a weight that can be masked."""
        return bool(self._chosen(program, context))

    def run(self, program: Program, context: Context) -> Program:
        """Mask the weights of the selected linears."""
        chosen = self._chosen(program, context)
        if self.end:
            self._begin_schedule(program, chosen, context)
        elif self.score == MAGNITUDE:
            values = {site: _rows(program, weight) for site, (weight, _) in chosen.items()}
            masks = self._masks(values)
            with program.edit(by=str(self)) as editor:
                for site, (weight, _) in chosen.items():
                    self._mask(editor, weight, masks[site], context)
        elif chosen:
            if program.device.type == "meta":
                raise PassError(
                    f"{self.score} measures, and a program on the meta device has no values: give it weights first"
                )
            layers = LayerSites(program, chosen)
            context.calibrate_layers(program, lambda part: self._calibrated(program, part, layers, context))
        return program

    def prove(self, before: Program, after: Program, proof: Proof, context: Context) -> None:
        """Every group keeps as many as the pattern says; but for SparseGPT they are what they were, and by magnitude the highest."""
        if self.end:
            self._prove_begin(before, after, proof, context)
            return
        old, new = _matrices(before), _matrices(after)
        dropped = 0
        sites = list(dict.fromkeys(edit.site for edit in context.edits))
        for site in sites:
            was, now = old[site], new[site]
            if self.score != SPARSEGPT and not bool(((now == was) | (now == 0)).all()):
                raise VerificationError(f"{site}: it changed weights that it keeps")
            self._check_counts(site, was, now)
            dropped += int((now == 0).sum()) - int((was == 0).sum())
        if self.score == MAGNITUDE and self.scope == "global":
            self._check_highest(
                "the model",
                *(torch.cat([rows[site].reshape(1, -1) for site in sites], 1) for rows in (old, new)),
            )

    def _check_counts(self, site: str, was: torch.Tensor, now: torch.Tensor) -> None:
        """Raise VerificationError for a group that keeps too many, or, by magnitude, a lower one than it drops."""
        groups = parse_pattern(self.pattern)
        if groups is not None:
            kept, size = groups
            for first, second in ((was, now), (was.T, now.T)) if self.transposable else ((was, now),):
                blocks = [rows.reshape(len(rows), -1, size) for rows in (first, second)]
                if bool(((blocks[1] != 0).sum(-1) > kept).any()):
                    raise VerificationError(f"{site}: it keeps more than {kept} weights of a group of {size}")
                if self.score == MAGNITUDE and not self.transposable:
                    self._check_highest(site, *blocks)
            return
        by_row = self._scope == "row"
        first, second = (rows if by_row else rows.reshape(1, -1) for rows in (was, now))
        if self._scope != "global" and bool(
            ((second != 0).sum(-1) > first.shape[1] - round(self.sparsity * first.shape[1])).any()
        ):
            raise VerificationError(f"{site}: it keeps more than {1 - self.sparsity:g} of its weights")
        if self.score == MAGNITUDE and self._scope != "global":
            self._check_highest(site, first, second)

    def _check_highest(self, site: str, was: torch.Tensor, now: torch.Tensor) -> None:
        """Raise VerificationError where, along the last axis, something dropped is larger than something kept."""
        kept = torch.where(now != 0, was.abs(), torch.inf).amin(-1)
        dropped = torch.where(now != 0, 0.0, was.abs()).amax(-1)
        if bool((dropped > kept).any()):
            raise VerificationError(f"{site}: it drops weights of higher {self.score} than it keeps")

    def _begin_schedule(self, program: Program, chosen: Sites, context: Context) -> None:
        """Mask the initial share, by buffers that training changes, and leave the schedule with the program."""
        values = {site: _rows(program, weight) for site, (weight, _) in chosen.items()}
        if self.initial:
            masks = replace(self, sparsity=self.initial, initial=0.0, end=0, begin=0, every=1)._masks(values)
        else:
            masks = {site: torch.ones_like(value, dtype=torch.bool) for site, value in values.items()}
        names: dict[str, str] = {}
        with program.edit(by=str(self)) as editor:
            for site, (weight, _) in chosen.items():
                names[site] = self._mask(editor, weight, masks[site], context)
        if chosen:
            weights = {site: str(weight.node.target) for site, (weight, _) in chosen.items()}
            turned = tuple(names[site] for site, (weight, _) in chosen.items() if weight.transposed)
            pairs = tuple((names[site], program.ties.get(name, name)) for site, name in weights.items())
            rule = MaskSchedule(
                pairs,
                self.pattern,
                self._scope,
                self._final,
                self.initial,
                self.begin,
                self.end,
                self.every,
                turned,
            )
            program.step_rules = (*program.step_rules, rule)

    def _prove_begin(self, before: Program, after: Program, proof: Proof, context: Context) -> None:
        """Without an initial share it computes what it did; else it is pruned by that."""
        if self.initial:
            replace(self, sparsity=self.initial, initial=0.0, end=0, begin=0, every=1).prove(
                before, after, proof, context
            )
            return
        old, new = _matrices(before), _matrices(after)
        for edit in context.edits:
            if not torch.equal(old[edit.site], new[edit.site]):
                raise VerificationError(f"{edit.site}: it masks weights before its schedule begins")

    @property
    def _scope(self) -> str:
        return self.scope or ("row" if self.score == WANDA else "layer")

    def _chosen(self, program: Program, context: Context) -> Sites:
        """The sites that are pruned; the others are declined."""
        found: Sites = {}
        for node in linears(program.graph):
            weight = weight_of(program, node)
            if weight is not None:
                found.setdefault(weight.site, (weight, []))[1].append(node)
        include = resolve_patterns(self.include, list(found), "include")
        exclude = resolve_patterns(self.exclude, list(found), "exclude")
        for site, reason in unnamed_weights(program).items():
            if matches(site, include) and not matches(site, exclude):
                context.declined(site, reason)
        chosen: Sites = {}
        for site, (weight, nodes) in found.items():
            if not matches(site, include) or matches(site, exclude):
                continue
            reason = self._reason_to_decline(program, weight)
            if reason:
                context.declined(site, reason)
            else:
                chosen[site] = (weight, nodes)
        return chosen

    def _reason_to_decline(self, program: Program, weight: Weight) -> str:
        """Why a weight cannot be pruned; empty where it can."""
        value = weight.node.meta["val"]
        if not value.is_floating_point() or value.dim() != 2:
            return f"its weight is {value.dtype} of {value.dim()} dimensions"
        groups = parse_pattern(self.pattern)
        inputs, outputs = value.shape[1 - weight.channel_axis], value.shape[weight.channel_axis]
        if groups is not None and inputs % groups[1]:
            return f"its {inputs} inputs are not a multiple of {groups[1]}"
        if groups is not None and self.transposable and outputs % groups[1]:
            return f"its {outputs} outputs are not a multiple of {groups[1]}"
        if read_elsewhere(weight):
            return "something else reads its weight too (a tied embedding)"
        if self.end and program.ties.get(name := str(weight.node.target), name) not in program.parameters:
            return "its weight is computed, of codes or by a delta, and has no magnitudes that train: prune before that pass"
        if self.score == SPARSEGPT and str(weight.node.target) not in program.parameters:
            return "its weight is computed, of codes or by a delta, and what is kept of it cannot change: prune before that pass"
        return ""

    def _masks(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """bool[out, in] for each site, by magnitude."""
        scores = {site: FUNCTIONS[MAGNITUDE](value, None) for site, value in values.items()}
        if self._scope == "global":
            return lowest_of_all(scores, self.sparsity)
        return {site: self._kept(item) for site, item in scores.items()}

    def _kept(self, scores: torch.Tensor) -> torch.Tensor:
        """bool[out, in] by the pattern."""
        groups = parse_pattern(self.pattern)
        if groups is None:
            return lowest_share(scores, self.sparsity, self._scope == "row")
        return transposable_mask(scores, *groups) if self.transposable else sparsity_mask(scores, *groups)

    def _calibrated(self, program: Program, part: LayerPart, layers: LayerSites, context: Context) -> None:
        """Prune what a part reads, by what flows into its products."""
        sites = layers.of(part, context)
        if not sites:
            return
        chosen = context.kept(f"masks of {part}", lambda: self._scored(program, part, sites))
        with program.edit(by=str(self)) as editor:
            for site, (weight, _) in sites.items():
                new, mask = chosen[site]
                name = str(weight.node.target)
                if new is not None:
                    program.parameters[name] = new
                self._mask(editor, weight, mask, context, () if new is None else (name,))

    def _scored(
        self, program: Program, part: LayerPart, sites: Sites
    ) -> dict[str, tuple[torch.Tensor | None, torch.Tensor]]:
        """The new weight of each site, if it is another, and what is kept of it, bool[out, in]."""
        sums = InputSums.observed(part, sites, whole=self.score == SPARSEGPT)
        groups, chosen = parse_pattern(self.pattern), dict[str, tuple[torch.Tensor | None, torch.Tensor]]()
        for site, (weight, nodes) in sites.items():
            rows, found = _rows(program, weight), sums.of(nodes)
            if self.score == SPARSEGPT:
                new, mask = sparsegpt(rows, found, self._kept, BLOCK if groups is None else groups[1])
                chosen[site] = (new.T if weight.transposed else new).contiguous(), mask
            else:
                chosen[site] = None, self._kept(FUNCTIONS[self.score](rows, found))
        return chosen

    def _mask(
        self,
        editor: Editor,
        weight: Weight,
        kept: torch.Tensor,
        context: Context,
        tensors: tuple[str, ...] = (),
    ) -> str:
        """Let the readers of a weight read it masked; returns the name of the mask. Raises PassError where nothing of it is left."""
        if kept.device.type != "meta" and not bool(kept.any()):
            share = (
                f"{self.sparsity:g} of the weights of all linears"
                if self._scope == "global"
                else f"{self.sparsity:g}"
            )
            raise PassError(
                f"{weight.site}: sparsity={share} leaves none of its {kept.numel()} weights: ask for less, exclude it, or choose "
                "scope='layer'"
            )
        mask, name = (kept.T if weight.transposed else kept).contiguous(), editor.fresh(f"{weight.site}_mask")
        reader = (
            editor.buffer(name, mask, like=weight.node, part=NodeRole.MASK)
            if self.end
            else editor.parameter(name, mask, like=weight.node, frozen=True, part=NodeRole.MASK)
        )
        masked = editor.call(
            aten.mul.Tensor, weight.node, reader,
            like=_first_user(weight.node), site=weight.site, part=NodeRole.WEIGHT,
        )  # fmt: skip
        editor.replace(weight.node, masked)
        what = self.pattern if parse_pattern(self.pattern) else f"{1 - self.sparsity:g}"
        when = f" in steps {self.begin} to {self.end} of training, every {self.every}" if self.end else ""
        context.edited(weight.site, f"{what} of its weights by {self.score}{when}", tensors)
        return name


def _rows(program: Program, weight: Weight) -> torch.Tensor:
    """A weight as f[out, in]."""
    value = in_memory(evaluate(program, weight.node))
    return value.T if weight.transposed else value


def _matrices(program: Program) -> dict[str, torch.Tensor]:
    """The weight f[out, in] of each linear, by site."""
    found: dict[str, torch.Tensor] = {}
    for node in linears(program.graph):
        weight = weight_of(program, node)
        if weight is not None and weight.site not in found:
            found[weight.site] = _rows(program, weight)
    return found


def _first_user(node: fx.Node) -> fx.Node:
    """The user that comes first in the graph."""
    return min(node.users)
