"""Quantize: weights of linears, experts and embeddings as integer codes, and rounded activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from glob import escape
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.site_filter import resolve_patterns
from bmgraph.analysis.weight_sites import (
    Weight,
    product_sites,
)
from bmgraph.errors import InputError, PassError, ResourceError
from bmgraph.ir.editor import Editor
from bmgraph.ir.program import Program
from bmgraph.lowering.store_codes import trained_sites
from bmgraph.pass_manager.context import CALIBRATION, Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.pass_manager.target import Target
from bmgraph.passes.qat.store_codes import StoreCodes
from bmgraph.passes.quantize.attention_inputs import AttentionInputs
from bmgraph.passes.quantize.bias_correction import bias_of, correct, mean_errors
from bmgraph.passes.quantize.block_codes import USUAL_BLOCK, BlockCodes
from bmgraph.passes.quantize.chosen_sites import SiteRules, chosen_sites
from bmgraph.passes.quantize.code_grid import Encoded
from bmgraph.passes.quantize.layerwise import LayerwiseQuantization
from bmgraph.passes.quantize.lookups import embedding_sites, quantize_lookups
from bmgraph.passes.quantize.mixed import bits_within, choose_bits, smallest_codes
from bmgraph.passes.quantize.mse import LEAST_SHARE, ScaleRule
from bmgraph.passes.quantize.option_checks import check_options
from bmgraph.passes.quantize.ranges import RANGES
from bmgraph.passes.quantize.round_inputs import InputRounding, expert_blocks, ranges_of
from bmgraph.passes.quantize.schemes import METHODS, ONLY_TENSORRT, SCHEMES, WITHOUT_FP8
from bmgraph.passes.quantize.site_drift import within_drift
from bmgraph.passes.quantize.weight_format import WeightFormat
from bmgraph.passes.rotate.rotate import ROTATED, Rotate
from bmgraph.passes.smooth import SMOOTHED, Smooth
from bmgraph.passes.split_outliers import SplitOutliers
from bmgraph.verify.measures import Measure, OutputsMoved, WeightsMoved
from bmgraph.verify.site_outputs import entering

ONE_BATCH = 1.5
"""How many times more the output of a site may move on one batch than `site_drift` allows on all."""


@dataclass(frozen=True, repr=False)
class Quantize(ModelPass):
    """Store the weights of linears as integer codes and round activations.

    scheme: "int8", s8 codes with one scale for each output channel, or with `group` for each group of inputs of an output, or
    "int4", codes in groups (of 32), two in a byte. group: 16, 32, 64, 128 or 256, for decoders, whose time goes into reading weights.
    "fp8": e4m3 codes with one scale for each output channel, and activations of static scales in e4m3 too, on TensorRT alone, for GPUs of
    compute capability 8.9 and later. "int2" is packed as densely, and so is "int3", which runs on torch alone. "mixed" gives each site one of the sizes that the target
    has, so that weights have `average` bits (scales not counted) and outputs drift least where layers are rounded; the history
    records them as `bits`, pairs of a site and its bits.

    symmetric: codes in groups lie around 0; with False each group has a zero point, of as many bits as a code, too, so that codes span
    the values of the group, and 0, alone. TensorRT has no kernel for these; ONNX Runtime's takes as long as without. They pay for int4 in
    groups of up to 64 with gptq or quantease (a sixth less drift of logits, for 1/16 of a bit of a weight); in groups of 128, and with 3
    bits, they change little, and rtn with 3 or 2 bits becomes worse (four layers of a small language model).

    method: how codes are chosen. Without data: "rtn" takes the nearest, "mse" at the scales with the least square error, "hqq"
    (int4) at scales that outliers move little. On calibration data, layer after layer (int4): "awq" scales channels by
    what they carry, where that folds into norms and linears; "gptq" lets what one column of a weight loses be made up for by the
    others; "quantease" begins there, fits scales and chooses each code again, given all others. Larger groups, which run faster,
    need these. alike: each row of inputs (a token's) counts the same in what these measure, however large it is; by default for gptq
    and quantease.

    activations: "static" rounds the input of a linear to u8 with a scale measured on the calibration batches (to s8 around 0
    where the target is symmetric), "dynamic" with a scale measured at each call over the whole tensor, "none" leaves it in
    floating point; the default is the best mode that the target supports: static with calibration, else dynamic, else none.
    For codes in groups it is "blocks", each group of inputs rounded to s8 with a scale of its own, where the target's kernel does
    so (ONNX Runtime), else "none".

    embeddings: bits (8 or 4) of the rows of embeddings, in groups, too; by default they stay as they are. A head that is tied
    to an embedding is quantized where that is: each then has codes of its own. include, exclude: globs over module paths.
    site_drift: a site whose output changes by more (relative L2, on calibration batches) is declined; by default 0.1 for
    int8, 0.5 for int4. ranges: what static scales cover: "max" all values that were seen, "percentile" 99.99% of them, "entropy" what
    tells most of their distribution. correct_bias: take what rounding adds to the means of outputs off biases, where linears have
    them (rtn, mse, hqq). outliers: with static scales, run `SplitOutliers` first, but for fp8, whose codes are dense where values are small. smooth: run `Smooth` before that, unless it has
    run; by default where the target gains by it and scales are static. rotate: run `Rotate` before all of these, unless it has run. attention: round the queries and keys of attentions
    whose projections are quantized too, to s8 with static scales; by default where the target multiplies them as integers.

    The weight stays an expression in front of `aten.linear`, so that later passes find the site. Weights that another
    operator reads too (tied embeddings), weights with a side below `smallest`, routers and, where the target has no kernel for
    them, codes in groups of experts are declined. Methods on data give experts the nearest codes.

    Raises PassError where a glob matches nothing, no site is left or the target has no kernel for such codes, ResourceError
    where static scales or a method on data have no calibration. Sources: Jacob et al. 2018 (affine quantization),
    Krishnamoorthi 2018 (per-channel weights), and those in the files of methods, such as `gptq.py`.

    Example:
        >>> from bmgraph.passes import Quantize
        >>> Quantize("int8", exclude=("*.pooler.*",))
        quantize{exclude=[*.pooler.*]}
        >>> Quantize("int4", method="gptq", group=128)
        quantize{scheme=int4,method=gptq,group=128}
        >>> Quantize("int8", group=32, embeddings=8)
        quantize{group=32,embeddings=8}
        >>> Quantize("int4", method="gptq", group=64, symmetric=False)
        quantize{scheme=int4,method=gptq,group=64,symmetric=false}
    """

    effect: ClassVar[Effect] = "approximate"
    provides: ClassVar[frozenset[str]] = frozenset({"quantized"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"quantized"})
    default_drift: ClassVar[float] = 0.3
    saves: ClassVar[bool] = True
    other_names: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"group_size": "group", "block_size": "group", "is_symmetric": "symmetric", "sym": "symmetric"}
    )
    version: ClassVar[int] = 4
    former_defaults: ClassVar[Mapping[int, Mapping[str, object]]] = MappingProxyType({1: {"smooth": False}})

    scheme: str = field(default="int8")
    activations: str | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    site_drift: float | None = None
    outliers: bool = True
    smallest: int = 16
    method: str = field(default="rtn", kw_only=True)
    group: int | None = field(default=None, kw_only=True)
    embeddings: int | None = field(default=None, kw_only=True)
    smooth: bool | None = field(default=None, kw_only=True)
    ranges: str = field(default="max", kw_only=True)
    correct_bias: bool = field(default=False, kw_only=True)
    average: float | None = field(default=None, kw_only=True)
    bits: tuple[tuple[str, int], ...] = field(default=(), kw_only=True)
    attention: bool | None = field(default=None, kw_only=True)
    symmetric: bool = field(default=True, kw_only=True)
    alike: bool | None = field(default=None, kw_only=True)
    rotate: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, self.format)

    @classmethod
    def of_version(cls, version: int, options: Mapping[str, object]) -> Mapping[str, object]:
        """Before version 4, GPTQ counted inputs as large as they are. Before version 3, int8 had one scale for each output channel, and
        `group` said what rows of embeddings had."""
        if version < 4 and options.get("method") == "gptq":
            options = {"alike": False, **options}
        if version >= 3 or options.get("scheme", "int8") != "int8" or options.get("group") is None:
            return options
        if options.get("embeddings") is not None and options["group"] != USUAL_BLOCK:
            raise InputError(
                f"quantize@{version} with embeddings={options['embeddings']} in groups of {options['group']}, and int8 codes with one "
                "scale for each output: groups are those of both now: leave group out, or write a newer text"
            )
        return {name: value for name, value in options.items() if name != "group"}

    def format(self, positive: bool) -> WeightFormat:
        """The format of the codes, of mixed ones the smallest; `positive`: scales must be."""
        if self.average is not None:
            smallest = smallest_codes(self.average)
            bits = 2 if smallest == 3 else smallest  # few kernels have 3 bits
            return self._in_groups(bits, positive)
        return SCHEMES[self.scheme].format(self.group, positive, self.symmetric)

    def _in_groups(self, bits: int, positive: bool) -> BlockCodes:
        """Codes of some bits in groups."""
        return BlockCodes(bits, self.group or USUAL_BLOCK, positive, self.symmetric)

    @property
    def allowed_drift(self) -> float:
        """As much as codes of their number of bits need."""
        return self.format(False).drift

    @property
    def _site_drift(self) -> float:
        return self.format(False).site_drift if self.site_drift is None else self.site_drift

    @property
    def measured(self) -> Measure:
        """The weights bound codes that are the nearest ones; the outputs of their sites those that are calibrated."""
        if METHODS[self.method].choose is not None:
            return OutputsMoved(ONE_BATCH * self._site_drift, clips=self.ranges != "max")
        searched = METHODS[self.method].scales is not None
        span = LEAST_SHARE if searched else 1.0
        return WeightsMoved(
            self.format(False).weight_bound, clips=self.ranges != "max", biases=self.correct_bias, span=span
        )

    @property
    def resources(self) -> tuple[str, ...]:
        """Calibration batches, for static scales, smoothing and methods that calibrate."""
        reads = self.activations == "static" or self.smooth or self.correct_bias or self._measures
        return (CALIBRATION,) if reads else ()

    @property
    def _measures(self) -> bool:
        """Whether codes are chosen on calibration data."""
        searches = self.average is not None and not self.bits
        return searches or METHODS[self.method].choose is not None

    def fits(self, program: Program, context: Context) -> bool:
        """Whether a product's weight can be rounded."""
        sites = product_sites(program)
        include, exclude = (
            resolve_patterns(patterns, sites, name)
            for patterns, name in ((self.include, "include"), (self.exclude, "exclude"))
        )
        rules = self._site_rules(self.format(context.target.positive_scales), context.target)
        return bool(chosen_sites(program, context, rules, include, exclude))

    def run(self, program: Program, context: Context) -> Program:
        """Quantize the selected linears, experts and embeddings; weights that trained in codes stay these."""
        trained = trained_sites(program)
        if trained:
            program = context.run(StoreCodes(), program)
            for site in trained:
                context.edited(site, "the codes that it was trained with")
        sites = [*product_sites(program), *(embedding_sites(program) if self.embeddings else ())]
        include = resolve_patterns(self.include, sites, "include")
        exclude = (*resolve_patterns(self.exclude, sites, "exclude"), *map(escape, trained))
        target = context.target
        form = self.format(target.positive_scales)
        calibrated = context.has(CALIBRATION) and program.device.type != "meta"
        mode = self.mode(form, target, calibrated)
        self.check_target(form, mode, target)
        if self.ranges != "max" and mode != "static":
            raise ResourceError(
                f"ranges={self.ranges!r} are those of static scales, and activations are {mode} here: give calibration batches "
                "and activations='static'"
            )
        if (self._measures or self.correct_bias) and program.device.type == "meta":
            raise PassError(
                "it measures, and a program on the meta device has no values: give it weights first"
            )
        if self.rotate and not any(ROTATED in record.provides for record in program.history):
            program = context.run(Rotate(untie=self.embeddings is not None), program)
        if self._smooths(program, target, mode):
            program = context.run(Smooth(include=include, exclude=exclude), program)
        prepare = METHODS[self.method].prepare
        if prepare is not None:
            assert isinstance(form, BlockCodes)
            program = context.run(prepare(form, include, exclude), program)
        if mode == "static" and self.outliers and form.input_codes is None:
            program = context.run(SplitOutliers(include=include, exclude=exclude), program)
        if self.embeddings:
            rows = self._in_groups(self.embeddings, target.positive_scales)
            quantize_lookups(
                program,
                context,
                rows,
                include,
                exclude,
                self.smallest,
                f"{self.embeddings}-bit rows",
                str(self),
                METHODS[self.method].scales,
            )
        chosen = chosen_sites(program, context, self._site_rules(form, target), include, exclude)
        attention = AttentionInputs()
        if self._rounds_attention(target, mode):
            attention = AttentionInputs.of(program, {weight.site for _, weight in chosen})
        rounding = self.input_rounding(program, context, chosen, form, mode, attention)
        forms = self._forms(program, context, form, chosen)
        choose = METHODS[self.method].choose
        if choose is None:
            self._nearest(program, context, chosen, forms, rounding, attention, self.method)
            return program
        experts = [item for item in chosen if item[1].node.meta["val"].dim() == 3]
        if experts:  # each reads inputs of its own, of which a batch may hold few
            self._nearest(program, context, experts, forms, rounding.alone(), attention, "rtn")
        plain = {weight.site for _, weight in chosen} - {weight.site for _, weight in experts}
        blocks = {
            site: item for site, item in forms.items() if site in plain and isinstance(item, BlockCodes)
        }
        LayerwiseQuantization(
            program, context, blocks, choose, self._site_drift, lambda site: self._said(forms[site], mode, self.method), str(self),
            rounding, METHODS[self.method].alike if self.alike is None else self.alike,
        ).run()  # fmt: skip
        return program

    def _site_rules(self, form: WeightFormat, target: Target) -> SiteRules:
        method = self.method if METHODS[self.method].choose is not None else ""
        return SiteRules(form, self.scheme, target, self.smallest, bool(self.embeddings), method)

    def _nearest(
        self,
        program: Program,
        context: Context,
        chosen: Sequence[tuple[fx.Node, Weight]],
        forms: Mapping[str, WeightFormat],
        rounding: InputRounding,
        attention: AttentionInputs,
        method: str,
    ) -> None:
        """Give sites their nearest codes, at the scales of a method without data, and round what enters them."""
        if context.has(CALIBRATION) and program.device.type != "meta":
            rule = METHODS[method].scales
            chosen = within_drift(
                program, context, chosen, forms, rule, rounding, attention, self._site_drift
            )
        rule, corrected = METHODS[method].scales, dict[str, list[str]]()
        biases: dict[str, torch.Tensor] = {}
        if self.correct_bias:
            errors = partial(mean_errors, program, context, chosen, forms, rule, rounding)
            biases = context.kept("mean errors of outputs", errors)
        with program.edit(by=str(self)) as editor:
            for linear, weight in chosen:
                bias = bias_of(program, linear)
                if bias in biases:
                    correct(editor, bias, biases[bias])
                    corrected.setdefault(weight.site, []).append(bias)
                self._quantize_weight(editor, forms[weight.site], weight, rule)
                rounding.apply(editor, linear, weight.site)
            for site in dict.fromkeys(weight.site for _, weight in chosen):
                said = self._said(forms[site], rounding.mode, method) + (
                    ", bias corrected" if site in corrected else ""
                )
                context.edited(site, said, corrected.get(site, ()))
            attention.apply(editor, context, {weight.site for _, weight in chosen}, self._site_drift)

    def _forms(
        self, program: Program, context: Context, form: WeightFormat, chosen: Sequence[tuple[fx.Node, Weight]]
    ) -> dict[str, WeightFormat]:
        """The format of each site's codes; mixed ones are chosen, unless `bits` says them, and recorded as `bits`."""
        sites = list(dict.fromkeys(weight.site for _, weight in chosen))
        if self.average is None:
            return dict.fromkeys(sites, form)
        positive, target = context.target.positive_scales, context.target
        forms = {size: self._in_groups(size, positive) for size in target.block_bits}
        known = dict(self.bits)
        if not known and chosen:
            usable = bits_within(target.block_bits, self.average, target.name)
            tried = {size: forms[size] for size in usable}
            with context.searching():
                known = choose_bits(program, context, chosen, tried, self.average)
            context.settle(replace(self, bits=tuple(known.items())))
        missing = [site for site in sites if site not in known]
        if missing:
            raise PassError(
                f"bits= says nothing of {missing[0]}: give the bits of every site, or leave it out to have them chosen"
            )
        wrong = next((site for site in sites if known[site] not in forms), None)
        if wrong is not None:
            raise PassError(f"{wrong}: {self._no_kernel(target, known[wrong])}")
        return {site: forms[known[site]] for site in sites}

    def _said(self, form: WeightFormat, mode: str, method: str) -> str:
        """What a site becomes, in words."""
        scheme = f"int{form.bits}" if isinstance(form, BlockCodes) else self.scheme
        return (
            f"{scheme} weight"
            + (f", {mode} activation" if mode != "none" else "")
            + (f" by {method}" if method != "rtn" else "")
        )

    def _smooths(self, program: Program, target: Target, mode: str) -> bool:
        """Whether to smooth first: as asked, else where the target gains by it; once is enough."""
        wanted = target.smooth and mode == "static" if self.smooth is None else self.smooth
        return wanted and not any(SMOOTHED in record.provides for record in program.history)

    def _rounds_attention(self, target: Target, mode: str) -> bool:
        """Whether to round queries and keys: as asked, else where the target gains by it."""
        if self.attention and not (target.attention and mode == "static"):
            raise PassError(
                f"attention=True: {target.name} multiplies no rounded queries and keys"
                if not target.attention
                else f"attention=True with {mode} activations: the scales of queries and keys are static, measured on calibration batches"
            )
        return target.attention and mode == "static" and self.attention is not False

    def check_target(self, form: WeightFormat, mode: str, target: Target) -> None:
        """Raise PassError for what a target does not take, ResourceError where a method has nothing to measure on."""
        if mode not in target.activation_modes:
            raise PassError(
                f"{target.name} takes {', '.join(target.activation_modes)} activations, not {mode}"
            )
        for granularity in dict.fromkeys((form.granularity, *(["block"] if self.embeddings else []))):
            if granularity not in target.weight_scales:
                raise PassError(f"{target.name} takes no weights with one scale for each {granularity}")
        if form.input_codes is not None and not target.float_codes:
            raise PassError(
                f"{target.name} has no kernel for fp8: {WITHOUT_FP8.get(target.name, ONLY_TENSORRT)}"
            )
        if not self.symmetric and not target.zero_points:
            raise PassError(f"{target.name} takes no codes with zero points: leave symmetric=False out")
        if isinstance(form, BlockCodes) and self.average is None and form.bits not in target.block_bits:
            raise PassError(self._no_kernel(target, form.bits))

    @staticmethod
    def _no_kernel(target: Target, bits: int) -> str:
        sizes = " or ".join(map(str, target.block_bits))
        return f"{target.name} has no kernel for codes of {bits} bits: choose codes of {sizes} bits, or the torch engine"

    def mode(self, form: WeightFormat, target: Target, calibrated: bool) -> str:
        """How activations are rounded: as asked, else the best mode of the format or, where that has no order, of the target,
        with what was given."""
        if self.activations is not None:
            return self.activations
        for mode in form.preferred_modes or target.activation_modes:
            if mode in target.activation_modes and (calibrated or mode != "static"):
                return mode
        raise ResourceError(
            f"{target.name} takes static activations only, whose scales are measured: pass calibration batches"
        )

    def input_rounding(
        self,
        program: Program,
        context: Context,
        chosen: Sequence[tuple[fx.Node, Weight]],
        form: WeightFormat,
        mode: str,
        attention: AttentionInputs,
    ) -> InputRounding:
        """How the inputs of the chosen products are rounded; the ranges of queries and keys are measured with theirs."""
        if mode == "none":
            return InputRounding(mode)
        grids = {}
        if mode == "static" and chosen:
            rule, symmetric = RANGES[self.ranges], context.target.symmetric
            names = {entering(linear).name for linear, _ in chosen}
            ranges = ranges_of(program, context, names | attention.names, rule, symmetric)
            grids = {name: ranges[name].grid(symmetric, form.input_codes) for name in names}
            attention.measured(ranges)
        if mode == "blocks":
            return InputRounding(mode, grids, {linear: form.input_block for linear, _ in chosen})
        return InputRounding(mode, grids, expert_blocks(chosen, context.target.expert_blocks))

    def codes(self, weight: torch.Tensor, axis: int) -> Encoded:
        """The nearest codes of a weight whose outputs lie along `axis`, and their scales."""
        return self.format(False).encode(weight, axis)

    def rounded(self, weight: torch.Tensor, axis: int) -> torch.Tensor:
        """The weight that its nearest codes stand for."""
        form = self.format(False)
        return form.decode(form.encode(weight, axis), weight.shape, axis)

    @staticmethod
    def _quantize_weight(editor: Editor, form: WeightFormat, weight: Weight, rule: ScaleRule | None) -> None:
        if f"{weight.site}_codes" in editor.program.parameters:
            return
        value = evaluate(editor.program, weight.node)
        stored = form.encode(value, weight.channel_axis, rule)
        made = form.place(editor, weight, stored, min(weight.node.users), weight.site)
        weight.node.replace_all_uses_with(made)
