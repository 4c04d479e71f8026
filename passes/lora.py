"""LoRA: train a low-rank update next to frozen linears."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from bmgraph.analysis.structure.sites import Linear
from bmgraph.deltas.family import Change, Delta
from bmgraph.deltas.low_rank import LowRank
from bmgraph.errors import InputError, VerificationError
from bmgraph.ir.program import Program
from bmgraph.passes.deltas.delta_pass import PEFT_NAMES, DeltaPass, uniform


@dataclass(frozen=True, repr=False)
class LoRA(DeltaPass):
    """Add `alpha / r * B A x` to the output of linears, and freeze all parameters but A [r, in] and B [out, r].

    targets, roles, exclude, layers, modules_to_save: as in `DeltaPass`; the default is attention queries and values. Where a
    role is a range of a fused linear's outputs, the delta changes that range alone. dropout: probability, applied to the
    input of A in training. seed: A is uniform in ±1/sqrt(in), drawn separately for each site; B is zero, so a new delta
    changes nothing. PEFT's names of options are taken too (`lora_alpha`, `target_modules`, ...).

    The weight may be any expression (int8 codes, masked, stored [in, out]): the delta is attached to the use, not to the
    weight. A second run adds further deltas, which train together with the first.

    Raises PassError where a pattern matches nothing. Source: Hu et al. 2021 (arXiv:2106.09685).

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.passes import LoRA
        >>> program = bg.capture(torch.nn.Linear(6, 4), (torch.randn(3, 6),))
        >>> tuned = bg.Pipeline([LoRA(r=2, targets=("*",))]).run(program)
        >>> sorted(set(tuned.parameters) - tuned.frozen)
        ['weight_lora_a', 'weight_lora_b']
    """

    other_names: ClassVar[Mapping[str, str]] = MappingProxyType(
        {**PEFT_NAMES, "lora_alpha": "alpha", "lora_dropout": "dropout", "rank": "r"}
    )
    family: ClassVar[type[LowRank]] = LowRank
    default_roles: ClassVar[tuple[str, ...]] = ("attention.q", "attention.v")
    """The choice that the paper found best."""

    r: int = 8
    alpha: float = 16
    dropout: float = field(default=0.0, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1:
            raise InputError(f"r={self.r}: give a rank of at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise InputError(f"alpha={self.alpha}: give a number above 0")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout={self.dropout}: give a probability of at least 0 and below 1")

    def new_change(self, program: Program, linear: Linear, stem: str) -> Change:
        """A uniform, B zero."""
        a = torch.empty(self.r, linear.in_features, device="meta")
        if program.device.type != "meta":
            a = (2 * uniform(f"{self.seed} {stem}", tuple(a.shape)) - 1) / math.sqrt(linear.in_features)
        return Change({"a": a, "b": torch.zeros(linear.out_features, self.r)}, {"scale": self.alpha / self.r})

    def told(self, change: Change) -> str:
        """Its rank."""
        return f"rank {change.tensors['a'].shape[0]}"

    def options(self) -> Mapping[str, Any]:
        """The dropout in front of A."""
        return {"dropout": self.dropout}

    def check_numbers(self, program: Program, delta: Delta) -> None:
        """Its dropout and its scale, alpha / r, must be those of this pass."""
        super().check_numbers(program, delta)
        if not math.isclose(delta.numbers["scale"], self.alpha / self.r):
            raise VerificationError(
                f"{delta.site}: its delta is scaled by {delta.numbers['scale']}, not alpha / r = {self.alpha / self.r}"
            )
