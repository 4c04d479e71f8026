"""The tables of schemes and methods: a new one is a row here and a file beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bmgraph.errors import InputError
from bmgraph.pass_manager.pass_base import ModelPass
from bmgraph.passes.quantize.awq import ScaleChannels, awq
from bmgraph.passes.quantize.block_codes import USUAL_BLOCK, BlockCodes
from bmgraph.passes.quantize.channel_codes import ChannelCodes
from bmgraph.passes.quantize.float_codes import FloatCodes
from bmgraph.passes.quantize.gptq import gptq
from bmgraph.passes.quantize.hqq import hqq_scales
from bmgraph.passes.quantize.layerwise import ChooseCodes
from bmgraph.passes.quantize.mse import ScaleRule, mse_scales
from bmgraph.passes.quantize.quantease import quantease
from bmgraph.passes.quantize.weight_format import WeightFormat


@dataclass(frozen=True)
class Method:
    """How codes are chosen. `scales`: the rule of scales, from the weight alone, at which codes are the nearest; None: the largest
    values fill them. `choose`: codes and scales from a weight and the second moments of its inputs, layer by layer. `alike`: every row of
    an input counts the same there, unless the pass says otherwise. `prepare`: the pass that runs first, given the format and the globs of sites that are included and excluded."""

    scales: ScaleRule | None = None
    choose: ChooseCodes | None = None
    alike: bool = False
    prepare: Callable[[BlockCodes, tuple[str, ...], tuple[str, ...]], ModelPass] | None = None


METHODS: dict[str, Method] = {
    "rtn": Method(),
    "mse": Method(scales=mse_scales),
    "hqq": Method(scales=hqq_scales),
    "awq": Method(
        choose=awq,
        prepare=lambda form, include, exclude: ScaleChannels(
            form.bits, form.block, form.positive, include, exclude, symmetric=form.symmetric
        ),
    ),
    "gptq": Method(choose=gptq, alike=True),
    "quantease": Method(choose=quantease, alike=True),
}
"""Name of a method -> how it chooses codes."""


@dataclass(frozen=True)
class Scheme:
    """`format`: the codes for a number of inputs in a group, None for what is usual, whether scales must be positive, and whether codes
    have no zero points; `methods`: names in METHODS."""

    format: Callable[[int | None, bool, bool], WeightFormat]
    methods: tuple[str, ...]


MIXED = "mixed"
"""Codes of several sizes, by a budget."""

NO_KERNELS = dict.fromkeys(
    ("fp4", "nf4"), "none of our targets has a kernel for products of such weights yet"
)
"""Schemes that are asked for and refused -> why."""


def _in_groups(bits: int) -> Callable[[int | None, bool, bool], BlockCodes]:
    """The codes of `bits` bits, in groups of the usual size where none is given."""
    return lambda group, positive, symmetric: BlockCodes(bits, group or USUAL_BLOCK, positive, symmetric)


def _int8(group: int | None, positive: bool, symmetric: bool) -> WeightFormat:
    """Codes of 8 bits: with one scale for each output, unless a group is given."""
    return ChannelCodes(127) if group is None else BlockCodes(8, group, positive, symmetric)


ONLY_TENSORRT = "take TensorRT, or int8, which takes as many bytes, and whose weights lose a third as much"
"""What to do where a target has no fp8."""

WITHOUT_FP8 = {
    "onnx": f"ONNX Runtime's CPU kernels decode all weights at every call; {ONLY_TENSORRT}",
    "openvino": f"OpenVINO makes such weights float32 when it compiles; {ONLY_TENSORRT}",
    "torch": f"its product on the CPU takes longer than with float32; {ONLY_TENSORRT}",
}
"""Targets -> why they have no fp8."""


def _fp8(group: int | None, positive: bool, symmetric: bool) -> WeightFormat:
    """e4m3 codes with one scale for each output."""
    if group is not None:
        raise InputError(f"group={group}: fp8 codes have one scale for each output")
    return FloatCodes()


SCHEMES: dict[str, Scheme] = {
    "int8": Scheme(_int8, ("rtn", "mse")),
    "fp8": Scheme(_fp8, ("rtn",)),
    **{f"int{bits}": Scheme(_in_groups(bits), tuple(METHODS)) for bits in (4, 3, 2)},
    MIXED: Scheme(_in_groups(4), tuple(METHODS)),
}
"""Name of a scheme -> its format and methods."""
