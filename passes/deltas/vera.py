"""VeRA: train two vectors for each linear, around random matrices that all share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import fx

from bmgraph.analysis.structure.sites import Linear
from bmgraph.deltas.family import Change
from bmgraph.deltas.low_rank_format import DROPOUT
from bmgraph.deltas.vera import LAMBDA_B, LAMBDA_D, A, B, VeRAFamily
from bmgraph.errors import InputError
from bmgraph.ir.program import Program
from bmgraph.passes.deltas.delta_pass import PEFT_NAMES, DeltaPass, uniform


@dataclass(frozen=True, repr=False)
class VeRA(DeltaPass):
    """Add `diag(b) B diag(d) A x` to the output of linears, and freeze all but the vectors d [r] and b [out].

    A and B are random, frozen, and shared by all linears, each of which takes as many of their columns and rows as it has
    inputs and outputs; seed: A is uniform in ±sqrt(3 / in), B in ±sqrt(3 / r). d_initial: every entry of d at first; b is zero,
    so that a new delta changes nothing. dropout: probability, applied to the input in training. targets, roles, exclude, layers,
    modules_to_save: as in `DeltaPass`; the default is attention queries and values. Merging is exact.

    Raises PassError where a pattern matches nothing. Source: Kopiczko et al. 2024 (arXiv:2310.11454).

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.passes import VeRA
        >>> program = bg.capture(torch.nn.Linear(6, 4), (torch.randn(3, 6),))
        >>> tuned = bg.Pipeline([VeRA(r=2, targets=("*",))]).run(program)
        >>> sorted(set(tuned.parameters) - tuned.frozen)
        ['weight_vera_lambda_b', 'weight_vera_lambda_d']
    """

    other_names: ClassVar[Mapping[str, str]] = MappingProxyType(
        {**PEFT_NAMES, "vera_dropout": "dropout", "projection_prng_key": "seed"}
    )
    family: ClassVar[type[VeRAFamily]] = VeRAFamily
    default_roles: ClassVar[tuple[str, ...]] = ("attention.q", "attention.v")

    r: int = 256
    d_initial: float = field(default=0.1, kw_only=True)
    dropout: float = field(default=0.0, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1:
            raise InputError(f"r={self.r}: give a rank of at least 1")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout={self.dropout}: give a probability of at least 0 and below 1")
        if not math.isfinite(self.d_initial) or self.d_initial == 0:
            raise InputError(f"d_initial={self.d_initial}: give a number other than 0")

    def options(self) -> Mapping[str, Any]:
        """The dropout."""
        return {DROPOUT: self.dropout}

    def shared_tensors(self, program: Program, chosen: Sequence[Linear]) -> Mapping[str, torch.Tensor]:
        """Random matrices, as large as the largest chosen linear needs."""
        inputs, outputs = max(x.in_features for x in chosen), max(x.out_features for x in chosen)
        shapes = {A: (self.r, inputs), B: (outputs, self.r)}
        return {key: uniform(program, f"{self.seed} vera {key}", shape, 3) for key, shape in shapes.items()}

    def new_change(self, program: Program, linear: Linear, stem: str, source: fx.Node | None) -> Change:
        """d constant, b zero."""
        lambda_d = torch.full((self.r,), self.d_initial)
        return Change({LAMBDA_D: lambda_d, LAMBDA_B: torch.zeros(linear.out_features)})

    def told(self, change: Change) -> str:
        """Its rank."""
        return f"vectors around rank {self.r}"
