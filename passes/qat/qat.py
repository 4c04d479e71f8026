"""QAT: training with rounded weights and activations, so that their codes lose little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.site_filter import resolve_patterns
from bmgraph.analysis.weight_sites import Weight, product_sites
from bmgraph.errors import InputError, PassError
from bmgraph.ir.editor import Editor
from bmgraph.ir.evaluation import upstream
from bmgraph.ir.node_role import NodeRole
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import CALIBRATION, Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.pass_manager.target import TORCH
from bmgraph.passes.qat.features import TRAINS_IN_CODES
from bmgraph.passes.quantize.attention_inputs import AttentionInputs
from bmgraph.passes.quantize.chosen_sites import SiteRules, chosen_sites
from bmgraph.passes.quantize.quantize import Quantize
from bmgraph.passes.quantize.schemes import METHODS, MIXED
from bmgraph.passes.quantize.weight_format import WeightFormat
from bmgraph.utils.stored_tensor import in_memory
from bmgraph.verify.measures import Measure, WeightsMoved

LEARNED, FIXED = "learned", "fixed"

STATIC = torch.ops.bmgraph.quantize_static.default


@dataclass(frozen=True, repr=False)
class QAT(ModelPass):
    """Round the weights of linears, and what they read, at every step of training, to the codes that an engine will multiply.

    Weights stay what trains; each forward reads them at their nearest codes, and gradients pass through the rounding where it does
    not clip (straight-through estimator). Engines store these codes and scales: their numbers are those of training, and nothing is
    calibrated or rounded again.

        trainer = bg.compile(model, [QAT("int4", activations="blocks")], example=batch, backend=Torch(optimizer=AdamW(lr=1e-5)))
        ...
        engine = bg.compile(trainer.program(), passes=[], backend="onnx")

    or, with the model before it as the teacher, in one list: `[QAT("int4"), Distill(steps=500)]`, which knows the target.

    scheme, group: the codes, as in `Quantize`: "int8" (one scale for each output, or for each group of inputs), "int4", "int3",
    "int2" in groups (of 32). method: the scales to begin with: "mse" those with the least square error, "rtn" those that the
    largest values fill, "hqq". step: "learned" trains them with the weights (LSQ), "fixed" keeps them. activations: "static"
    rounds inputs to 8 bits at scales that are measured on the calibration batches and then train, "dynamic" at a scale of each
    call, "blocks" (codes in groups) each group of inputs to 8 bits, as ONNX Runtime's and OpenVINO's kernels do, "none" not at all. By
    default what the target of `compile` has; a trainer's is torch, so say there what the engine will do. ranges, include, exclude,
    smallest: as in `Quantize`. centered: s8 codes of activations, and positive scales of weights with codes around 0, as TensorRT has
    them; by default as the target says.

    Optimizers such as Adam move all parameters by their rate, whatever the size of gradients: a step gets the rate of weights times
    its size over theirs, so that both change alike in proportion. Steps have no weight decay. What is frozen stays so, with its step.

    Tied embeddings, experts, routers and weights with a side below `smallest` are declined; `Quantize` after training rounds what is
    left, and keeps trained codes. Prune, Smooth and Shrink go before it.

    Raises InputError for options that do not fit, PassError where no site is left, a glob matches nothing or the program has no
    weights, ResourceError for static scales without calibration batches. Sources: Jacob et al. 2018 (arXiv:1712.05877), Esser et
    al. 2020 (LSQ, arXiv:1902.08153).

    Example:
        >>> from bmgraph.passes import QAT
        >>> QAT("int4", activations="blocks", group=64)
        qat{scheme=int4,activations=blocks,group=64}
    """

    effect: ClassVar[Effect] = "approximate"
    provides: ClassVar[frozenset[str]] = frozenset({TRAINS_IN_CODES})
    conflicts: ClassVar[frozenset[str]] = frozenset({"quantized", TRAINS_IN_CODES})
    default_drift: ClassVar[float] = 0.3

    scheme: str = field(default="int8")
    activations: str | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    step: str = LEARNED
    smallest: int = 16
    method: str = field(default="mse", kw_only=True)
    group: int | None = field(default=None, kw_only=True)
    ranges: str = field(default="max", kw_only=True)
    centered: bool | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step not in (LEARNED, FIXED):
            raise InputError(f"step={self.step!r}: choose {LEARNED} or {FIXED}")
        if self.scheme == MIXED:
            raise InputError(
                "scheme='mixed': bits are searched after training; give several QAT(...) with include="
            )
        if self.method in METHODS and METHODS[self.method].choose is not None:
            first = ", ".join(name for name, item in METHODS.items() if item.choose is None)
            raise InputError(
                f"method={self.method!r} chooses codes that training would change: choose scales to begin with, {first}"
            )
        self._rounding  # noqa: B018  (checks the options that both have)

    @property
    def _rounding(self) -> Quantize:
        """The pass that rounds after training as this one does before it."""
        return Quantize(
            self.scheme, self.activations, self.include, self.exclude, smallest=self.smallest, method=self.method, group=self.group,
            ranges=self.ranges,
        )  # fmt: skip

    @property
    def allowed_drift(self) -> float:
        """As much as codes of their number of bits need."""
        return self._rounding.allowed_drift

    @property
    def measured(self) -> Measure:
        """How far rounding moves weights before they train."""
        return WeightsMoved(self._rounding.format(False).weight_bound, clips=self.ranges != "max")

    @property
    def resources(self) -> tuple[str, ...]:
        """Calibration batches, for static scales."""
        return (CALIBRATION,) if self.activations == "static" else ()

    def run(self, program: Program, context: Context) -> Program:
        """Round the selected linears and their inputs."""
        if program.device.type == "meta":
            raise PassError(
                "a program on the meta device has no values to choose scales of: load its weights first"
            )
        rounding, target = self._rounding, context.target
        sites = product_sites(program)
        include = resolve_patterns(self.include, sites, "include")
        exclude = resolve_patterns(self.exclude, sites, "exclude")
        if self.centered is not None:
            target = replace(target, symmetric=self.centered, positive_scales=self.centered)
            context = replace(context, target=target)
        form = rounding.format(target.positive_scales)
        mode = rounding.mode(form, target, context.has(CALIBRATION))
        if target.name != TORCH.name:  # a trainer trains for any target
            rounding.check_target(form, mode, target)
        rules = SiteRules(form, self.scheme, context.target, self.smallest, False, "", trains=True)
        chosen = chosen_sites(program, context, rules, include, exclude)
        inputs = rounding.input_rounding(program, context, chosen, form, mode, AttentionInputs())
        trained = {weight.site: self._trains(program, weight) for _, weight in chosen}
        inputs = replace(inputs, trains=any(trained.values()))
        with program.edit(by=str(self)) as editor:
            sizes = self._round_weights(editor, form, chosen, trained)
            for linear, weight in chosen:
                inputs.apply(editor, linear, weight.site)
            for site in sizes:
                context.edited(site, self._said(mode, trained[site]))
            for node in editor.graph.nodes:
                if node.meta.get("pass") == str(self) and node.target is STATIC and inputs.trains:
                    _set_rate(program, str(node.args[1].target), sizes[str(node.meta["site"])])
        return program

    def _trains(self, program: Program, weight: Weight) -> bool:
        """Whether the steps of a weight train: where they are learned, and a parameter that the weight is made of trains."""
        names = {str(item.target) for item in upstream(weight.node) if item.op == "get_attr"}
        return self.step == LEARNED and bool(names & (set(program.parameters) - program.frozen))

    def _round_weights(
        self,
        editor: Editor,
        form: WeightFormat,
        chosen: Sequence[tuple[fx.Node, Weight]],
        trained: Mapping[str, bool],
    ) -> dict[str, float]:
        """Let all readers of the chosen weights read them rounded; returns the root mean square of each weight."""
        program, rule = editor.program, METHODS[self.method].scales
        sizes: dict[str, float] = {}
        for _, weight in chosen:
            if weight.site in sizes:
                continue
            value = in_memory(evaluate(program, weight.node))
            scale = form.encode(value, weight.channel_axis, rule).scale
            sizes[weight.site] = float(value.double().square().mean().sqrt())
            name = editor.fresh(f"{weight.site}_step")
            reader = editor.parameter(
                name, scale, like=weight.node, frozen=not trained[weight.site], part=NodeRole.STEP
            )
            if trained[weight.site]:
                _set_rate(program, name, sizes[weight.site])
            made = form.simulate(editor, weight, reader, min(weight.node.users))
            editor.replace(weight.node, made)
        return sizes

    def _said(self, mode: str, trains: bool) -> str:
        """What a site becomes, in words."""
        rounded = f", {mode} activation" if mode != "none" else ""
        return f"{self.scheme} weight{rounded}, {LEARNED if trains else FIXED} steps"


def _set_rate(program: Program, name: str, size: float) -> None:
    """Let steps move as their weights do in proportion to their size, under optimizers whose moves do not depend on gradients' sizes."""
    step = float(program.tensor(name).double().abs().mean())
    if step > 0 and size > 0:
        program.lr_factors = {**program.lr_factors, name: step / size}
