"""What the passes that add adapters have in common: where they go, their activation, and how a new one is made."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from bmgraph.analysis.structure.sites import Linear
from bmgraph.deltas.bottleneck import ACTIVATION, DOWN, DOWN_BIAS, SCALE, UP, UP_BIAS
from bmgraph.deltas.family import Change
from bmgraph.errors import InputError
from bmgraph.ir.program import Program
from bmgraph.passes.deltas.delta_pass import PEFT_NAMES, DeltaPass, uniform

PLACES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"houlsby": ("attention.o", "feedforward.down"), "pfeiffer": ("feedforward.down",)}
)
"""Name of a place -> the roles of the linears behind which adapters go."""

ADAPTER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        **PEFT_NAMES,
        "modified_modules": "targets",
        "exclude_modules": "exclude",
        "bottleneck_dim": "bottleneck",
        "reduction_factor": "reduction",
        "non_linearity": "activation",
    }
)
"""What OpenDelta calls the options of these passes."""


@dataclass(frozen=True, repr=False)
class BottleneckPass(DeltaPass):
    """Add `scale * (up activation(down value + down_bias) + up_bias)` to outputs of linears, and freeze all else.

    place: where they go without targets and roles: "houlsby", behind attentions and feed-forwards (Houlsby et al. 2019), or
    "pfeiffer", behind feed-forwards alone (Pfeiffer et al. 2021). activation: between the matrices. scale: of what is added.
    seed: the first matrix is uniform in ±1/sqrt(its inputs), drawn separately for each site; the second is zero, so that a
    new adapter changes nothing. targets, roles, exclude, layers, modules_to_save: as in `DeltaPass`.
    """

    provides: ClassVar[frozenset[str]] = frozenset(
        {"adapter"}
    )  # no "delta", which `Merge` folds into a weight
    other_names: ClassVar[Mapping[str, str]] = ADAPTER_NAMES

    place: Literal["houlsby", "pfeiffer"] = field(default="houlsby", kw_only=True)
    activation: Literal["relu", "gelu", "silu", "tanh"] = field(default="gelu", kw_only=True)
    scale: float = field(default=1.0, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise InputError(f"scale={self.scale}: give a number above 0")

    def default_sites(self) -> tuple[str, ...]:
        """The roles of the place."""
        return PLACES[self.place]

    def options(self) -> Mapping[str, Any]:
        """The activation."""
        return {ACTIVATION: self.activation}

    @abstractmethod
    def width(self, linear: Linear) -> int:
        """The number of neurons of an adapter on a linear."""

    @abstractmethod
    def new_matrices(
        self, program: Program, linear: Linear, stem: str, source: fx.Node | None
    ) -> Mapping[str, torch.Tensor]:
        """The tensors that the matrices are made of, such that the second one is zero."""

    def new_change(self, program: Program, linear: Linear, stem: str, source: fx.Node | None) -> Change:
        """Matrices, and biases of zero."""
        biases = {DOWN_BIAS: torch.zeros(self.width(linear)), UP_BIAS: torch.zeros(linear.out_features)}
        tensors = {**self.new_matrices(program, linear, stem, source), **biases}
        return Change({key: tensors[key] for key in self.family.keys}, {SCALE: self.scale})

    def told(self, change: Change) -> str:
        """Its width."""
        return f"width {len(change.tensors[DOWN_BIAS])}"

    def drawn(self, program: Program, stem: str, key: str, *shape: int) -> torch.Tensor:
        """Uniform numbers in ±1/sqrt(inputs) for a tensor of an adapter."""
        return uniform(program, f"{self.seed} {stem} {key}", shape)


@dataclass(frozen=True, repr=False)
class PlainBottleneckPass(BottleneckPass):
    """A pass whose adapters have `bottleneck` neurons each, and two matrices."""

    bottleneck: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("bottleneck", self.bottleneck)

    @abstractmethod
    def inputs(self, linear: Linear, source: fx.Node | None) -> int:
        """The number of inputs of an adapter on a linear."""

    def width(self, linear: Linear) -> int:
        """As given."""
        return self.bottleneck

    def new_matrices(
        self, program: Program, linear: Linear, stem: str, source: fx.Node | None
    ) -> Mapping[str, torch.Tensor]:
        """down [r, inputs] uniform, up [out, r] zero."""
        down = self.drawn(program, stem, DOWN, self.bottleneck, self.inputs(linear, source))
        return {DOWN: down, UP: torch.zeros(linear.out_features, self.bottleneck)}


def check_positive(name: str, value: int) -> None:
    """Raise InputError for a size below 1."""
    if value < 1:
        raise InputError(f"{name}={value}: give a number of at least 1")
