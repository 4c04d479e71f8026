"""QAT: training with rounded weights and activations, so that their codes lose little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.site_filter import matches, resolve_patterns
from bmgraph.analysis.weight_sites import Weight, product_sites
from bmgraph.errors import InputError, PassError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import CALIBRATION, Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.pass_manager.target import TORCH
from bmgraph.passes.qat.features import FAKE_QUANTIZED
from bmgraph.passes.qat.rounded_weights import RoundedWeights
from bmgraph.passes.quantize.attention_inputs import AttentionInputs
from bmgraph.passes.quantize.block_codes import BlockCodes
from bmgraph.passes.quantize.chosen_sites import SiteRules, chosen_sites
from bmgraph.passes.quantize.layerwise import LayerwiseQuantization
from bmgraph.passes.quantize.lookups import embedding_sites
from bmgraph.passes.quantize.quantize import Quantize
from bmgraph.passes.quantize.round_inputs import InputRounding
from bmgraph.passes.quantize.schemes import METHODS, MIXED
from bmgraph.passes.quantize.weight_format import WeightFormat
from bmgraph.utils.stored_tensor import in_memory
from bmgraph.verify.measures import Measure, WeightsMoved

LEARNED, FIXED = "learned", "fixed"

EVERYTHING = ("*",)
"""The patterns that ask for no site by name."""

TABLE = "rows that are looked up do not train in codes: Quantize(embeddings=8) rounds them after training"
"""Why a table of embeddings that is asked for is declined."""


@dataclass(frozen=True, repr=False)
class QAT(ModelPass):
    """Round the weights of linears, and what they read, at every step of training, to the codes that an engine will multiply.

    Weights stay what trains; each forward reads them at their nearest codes, and gradients pass through the rounding where it does
    not clip (straight-through estimator). Engines store these codes and scales: their numbers are those of training, and nothing is
    searched or rounded again.

        trainer = bg.compile(model, [QAT("int4", activations="blocks")], example=batch, backend=Torch(optimizer=AdamW(lr=1e-5)))
        ...
        engine = bg.compile(trainer.program(), passes=[], backend="onnx")

    or, with the model before it as the teacher, in one list: `[QAT("int4"), Distill(steps=500)]`, which knows the target.

    scheme, group: the codes, as in `Quantize`: "int8" (one scale for each output, or for each group of inputs), "int4", "int3",
    "int2" in groups (of 32). method: what to begin with: the scales of least square error ("mse"), those that the largest values fill
    ("rtn"), "hqq", or, on calibration batches, layer after layer, the codes of "gptq", "quantease" or "awq". step: "learned" trains
    the scales with the weights (LSQ), "fixed" keeps them. activations: "static" rounds inputs to 8 bits at scales that are measured
    on the calibration batches and then train, "dynamic" at a scale of each call, "blocks" (codes in groups) each group of inputs to 8
    bits, as ONNX Runtime's and OpenVINO's kernels do, "none" not at all. By default what the target of `compile` has; a trainer's is
    torch, so say there what the engine will do. ranges, include, exclude, smallest: as in `Quantize`. Several QATs give sites codes of
    several sizes. centered: s8 codes of activations, and positive scales of weights with codes around 0, as TensorRT has them; by
    default as the target says.

    Optimizers such as Adam move all parameters by their rate, whatever the size of gradients: a step gets the rate of weights times
    its size over theirs, so that both change alike in proportion. Steps have no weight decay. What is frozen stays so, with its step.

    Embeddings (tied ones too), experts, routers and weights with a side below `smallest` are declined; `Quantize` after training
    rounds what is left (`embeddings=8` the rows of tables), and keeps trained codes. Prune, Smooth and Shrink go before it.

    Raises InputError for options that do not fit, PassError where no site is left, a glob matches nothing or the program has no
    weights, ResourceError for static scales and methods that calibrate without batches. Sources: Jacob et al. 2018
    (arXiv:1712.05877), Esser et al. 2020 (LSQ, arXiv:1902.08153).

    Example:
        >>> from bmgraph.passes import QAT
        >>> QAT("int4", activations="blocks", group=64)
        qat{scheme=int4,activations=blocks,group=64}
    """

    effect: ClassVar[Effect] = "approximate"
    provides: ClassVar[frozenset[str]] = frozenset({FAKE_QUANTIZED})
    conflicts: ClassVar[frozenset[str]] = frozenset({"quantized"})
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
        self._rounding()  # checks the options that both have

    def _rounding(self) -> Quantize:
        """The pass that rounds after training as this one does before it."""
        return Quantize(
            self.scheme, self.activations, self.include, self.exclude, smallest=self.smallest, method=self.method, group=self.group,
            ranges=self.ranges,
        )  # fmt: skip

    @property
    def allowed_drift(self) -> float:
        """As much as codes of their number of bits need."""
        return self._rounding().allowed_drift

    @property
    def _calibrates(self) -> bool:
        """Whether codes to begin with are chosen on calibration data."""
        return METHODS[self.method].choose is not None

    @property
    def measured(self) -> Measure | None:
        """How far rounding moves weights, or what they compute, before they train."""
        if self._calibrates:
            return self._rounding().measured
        return WeightsMoved(self._rounding().format(False).weight_bound, clips=self.ranges != "max")

    @property
    def resources(self) -> tuple[str, ...]:
        """Calibration batches, for static scales and methods that calibrate."""
        return (CALIBRATION,) if self.activations == "static" or self._calibrates else ()

    def run(self, program: Program, context: Context) -> Program:
        """Round the selected linears and their inputs."""
        if program.device.type == "meta":
            raise PassError(
                "a program on the meta device has no values to choose scales of: load its weights first"
            )
        rounding, target = self._rounding(), context.target
        sites = product_sites(program)
        tables = [name for name in embedding_sites(program) if name not in sites]
        include = resolve_patterns(self.include, [*sites, *tables], "include")
        exclude = resolve_patterns(self.exclude, [*sites, *tables], "exclude")
        for name in tables if self.include != EVERYTHING else []:
            if matches(name, include) and not matches(name, exclude):
                context.declined(name, TABLE)
        if self.centered is not None:
            target = replace(target, symmetric=self.centered, positive_scales=self.centered)
            context = replace(context, target=target)
        form = rounding.format(target.positive_scales)
        mode = rounding.mode(form, target, context.has(CALIBRATION))
        if target.name != TORCH.name:  # a trainer trains for any target
            rounding.check_target(form, mode, target)
        method = METHODS[self.method]
        if method.prepare is not None:
            assert isinstance(form, BlockCodes)
            program = context.run(method.prepare(form, include, exclude), program)
        rules = SiteRules(
            form,
            self.scheme,
            context.target,
            self.smallest,
            False,
            self.method if self._calibrates else "",
            trains=True,
        )
        chosen = chosen_sites(program, context, rules, include, exclude)
        weights = RoundedWeights(program, self.step == LEARNED)
        trained = {weight.site: weights.trains(weight) for _, weight in chosen}
        inputs = rounding.input_rounding(program, context, chosen, form, mode, AttentionInputs())
        inputs = replace(inputs, trains=any(trained.values()))
        if method.choose is not None:
            forms = {site: form for site in trained if isinstance(form, BlockCodes)}
            LayerwiseQuantization(
                program, context, forms, method.choose, form.site_drift, lambda site: self._said(mode, trained[site]), str(self),
                inputs, method.alike, weights.move,
            ).run()  # fmt: skip
        else:
            self._round(program, context, form, chosen, weights, inputs)
            for site in weights.sizes:
                context.edited(site, self._said(mode, trained[site]))
        weights.set_rates_of_inputs(str(self))
        return program

    def _round(
        self,
        program: Program,
        context: Context,
        form: WeightFormat,
        chosen: Sequence[tuple[fx.Node, Weight]],
        weights: RoundedWeights,
        inputs: InputRounding,
    ) -> None:
        """Round weights at scales that are chosen of them alone."""
        with program.edit(by=str(self)) as editor:
            for linear, weight in chosen:
                if weight.site not in weights.sizes:
                    value = in_memory(evaluate(program, weight.node))
                    stored = form.encode(value, weight.channel_axis, METHODS[self.method].scales)
                    editor.replace(weight.node, weights.keep(editor, form, weight, stored))
                inputs.apply(editor, linear, weight.site)

    def _said(self, mode: str, trains: bool) -> str:
        """What a site becomes, in words."""
        rounded = f", {mode} activation" if mode != "none" else ""
        return f"{self.scheme} weight{rounded}, {LEARNED if trains else FIXED} steps"
