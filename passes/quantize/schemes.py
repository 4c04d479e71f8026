"""The tables of schemes and methods: a new one is a row here and a file beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bmgraph.passes.quantize.block_codes import BlockCodes
from bmgraph.passes.quantize.channel_codes import ChannelCodes
from bmgraph.passes.quantize.gptq import gptq
from bmgraph.passes.quantize.layerwise import ChooseCodes
from bmgraph.passes.quantize.weight_format import WeightFormat


@dataclass(frozen=True)
class Method:
    """How codes are chosen. `choose`: from a weight and the second moments of its inputs, layer by layer; None: the nearest."""

    choose: ChooseCodes | None = None


METHODS: dict[str, Method] = {"rtn": Method(), "gptq": Method(gptq)}
"""Name of a method -> how it chooses codes."""


@dataclass(frozen=True)
class Scheme:
    """`format`: the codes for a number of inputs in a group, and whether scales must be positive; `methods`: names in METHODS."""

    format: Callable[[int, bool], WeightFormat]
    methods: tuple[str, ...]


SCHEMES: dict[str, Scheme] = {
    "int8": Scheme(lambda group, positive: ChannelCodes(127), ("rtn",)),
    "int4": Scheme(lambda group, positive: BlockCodes(4, group, positive), ("rtn", "gptq")),
}
"""Name of a scheme -> its format and methods."""
