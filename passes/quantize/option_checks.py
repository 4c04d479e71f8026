"""Which options of `Quantize` fit each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from bmgraph.errors import InputError
from bmgraph.passes.quantize.block_codes import BLOCKS, BlockCodes
from bmgraph.passes.quantize.mixed import smallest_codes
from bmgraph.passes.quantize.ranges import RANGES
from bmgraph.passes.quantize.schemes import METHODS, MIXED, NO_KERNELS, SCHEMES
from bmgraph.passes.quantize.weight_format import WeightFormat

if TYPE_CHECKING:
    from bmgraph.passes.quantize.quantize import Quantize

ACTIVATIONS = (None, "static", "dynamic", "none", "blocks")

EMBEDDINGS = (8, 4)
"""Bits that rows of embeddings may have."""


def check_options(given: Quantize, format: Callable[[bool], WeightFormat]) -> None:
    """Raise InputError for an option that is not known, or does not fit another; `format` makes the format of the codes, for positive
    scales or any."""
    if given.scheme in NO_KERNELS:
        raise InputError(
            f"scheme={given.scheme!r}: {NO_KERNELS[given.scheme]}; choose one of {', '.join(SCHEMES)}"
        )
    if given.scheme not in SCHEMES:
        raise InputError(f"scheme={given.scheme!r}: choose one of {', '.join(SCHEMES)}")
    _check_budget(given)
    if given.activations not in ACTIVATIONS:
        raise InputError(f"activations={given.activations!r}: choose static, dynamic, none or blocks")
    modes = format(False).activation_modes
    if given.activations is not None and given.activations not in modes:
        grouped = " in groups" if given.scheme == "int8" and given.group is not None else ""
        raise InputError(
            f"activations={given.activations!r}: {given.scheme}{grouped} takes {' or '.join(modes)}"
        )
    methods = SCHEMES[given.scheme].methods
    if given.method not in methods:
        known = (
            f"{given.scheme} has {' and '.join(methods)}"
            if given.method in METHODS
            else f"choose one of {', '.join(METHODS)}"
        )
        raise InputError(f"method={given.method!r}: {known}")
    if given.group is not None and given.group not in BLOCKS:
        raise InputError(f"group={given.group}: kernels have groups of {', '.join(map(str, BLOCKS))}")
    if given.embeddings is not None and given.embeddings not in EMBEDDINGS:
        raise InputError(f"embeddings={given.embeddings}: give the bits of a code, 8 or 4")
    if not given.symmetric and not given.embeddings and not isinstance(format(False), BlockCodes):
        raise InputError(
            f"symmetric=False: {given.scheme} codes with one scale for each output have no zero points; give group="
        )
    if given.site_drift is not None and not given.site_drift > 0:
        raise InputError(f"site_drift={given.site_drift}: give a bound above 0")
    if given.ranges not in RANGES:
        raise InputError(f"ranges={given.ranges!r}: choose one of {', '.join(RANGES)}")
    if given.ranges != "max" and given.activations not in (None, "static"):
        raise InputError(
            f"ranges={given.ranges!r} are those of static scales, not of {given.activations} ones"
        )
    if given.correct_bias and METHODS[given.method].choose is not None:
        raise InputError(
            f"correct_bias=True: {given.method} fits outputs with their means already: use rtn, mse or hqq"
        )
    if given.alike is not None and METHODS[given.method].choose is None:
        raise InputError(
            f"alike={given.alike}: {given.method} measures no inputs: use awq, gptq or quantease"
        )
    if given.smooth and given.activations == "none":
        raise InputError("smooth=True with activations='none': nothing rounds what it would smooth")


def _check_budget(given: Quantize) -> None:
    """Raise InputError for options of mixed codes that do not fit each other."""
    if given.scheme == MIXED and given.average is None:
        raise InputError(
            "scheme='mixed' needs a budget: give average=, the mean of the bits of codes, such as 4.5"
        )
    if given.scheme != MIXED and (given.average is not None or given.bits):
        raise InputError(f"average= and bits= are those of scheme='mixed', not of {given.scheme!r}")
    if given.average is not None:
        smallest_codes(given.average)
