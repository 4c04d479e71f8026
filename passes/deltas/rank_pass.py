"""What LoRA and its variants have in common: the rank and the scale of each linear, dropout, and biases that train too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeVar

import torch

from bmgraph.analysis.site_filter import means, resolve_patterns
from bmgraph.analysis.structure.sites import Linear, Structure
from bmgraph.deltas.biases import biases_of
from bmgraph.deltas.family import Delta
from bmgraph.deltas.low_rank_format import DROPOUT
from bmgraph.deltas.lr_ratio import check_lr_ratio, set_lr_ratio
from bmgraph.errors import InputError, VerificationError
from bmgraph.ir.evaluation import upstream
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.passes.deltas.delta_pass import PEFT_NAMES, DeltaPass, uniform

RANK_NAMES: Mapping[str, str] = MappingProxyType(
    {
        **PEFT_NAMES,
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "rank": "r",
        "use_rslora": "rslora",
        "loraplus_lr_ratio": "lr_ratio",
    }
)
"""What PEFT calls the options of these passes."""


Number = TypeVar("Number", int, float)


@dataclass(frozen=True, repr=False)
class RankPass(DeltaPass):
    """A pass whose deltas are products of a matrix A [r, in] and B [out, r] with a scale.

    The scale is alpha / r, or with rslora alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732). rank_pattern,
    alpha_pattern: other ranks and alphas, by patterns as in targets: {"*.v_proj": 4}; the first that fits counts.
    dropout: probability, applied to the input of A in training. seed: A is uniform in ±1/sqrt(in), drawn separately for each
    site. bias: the biases of the model that train whole beside the deltas: "none", "all", or "lora_only", those of the
    linears with a delta. lr_ratio: B, and vectors that train beside it (biases, DoRA's magnitudes), train at so many times the
    optimizer's learning rate (LoRA+, Hayou et al. 2024, arXiv:2402.12354: 16 where that rate is one for A); a folder of a delta
    does not hold it, programs and trainers do.
    """

    other_names: ClassVar[Mapping[str, str]] = RANK_NAMES
    default_roles: ClassVar[tuple[str, ...]] = ("attention.q", "attention.v")
    """The choice that the paper of LoRA found best."""

    r: int = 8
    alpha: float = 16
    dropout: float = field(default=0.0, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    rslora: bool = field(default=False, kw_only=True)
    rank_pattern: tuple[tuple[str, int], ...] = field(default=(), kw_only=True)
    alpha_pattern: tuple[tuple[str, float], ...] = field(default=(), kw_only=True)
    bias: Literal["none", "all", "lora_only"] = field(default="none", kw_only=True)
    lr_ratio: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for r in (self.r, *(rank for _, rank in self.rank_pattern)):
            if r < 1:
                raise InputError(f"r={r}: give a rank of at least 1")
        for alpha in (self.alpha, *(value for _, value in self.alpha_pattern)):
            if not (math.isfinite(alpha) and alpha > 0):
                raise InputError(f"alpha={alpha}: give a number above 0")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout={self.dropout}: give a probability of at least 0 and below 1")
        check_lr_ratio(self.lr_ratio)

    def run(self, program: Program, context: Context) -> Program:
        """Add the deltas, and let B train at its own rate."""
        known, whole = set(program.parameters), program.trained_whole
        program = super().run(program, context)
        if not known.issuperset(program.parameters):
            set_lr_ratio(program, known, whole, self.lr_ratio)
        return program

    def check_names(self, names: Sequence[str]) -> None:
        """Each pattern of a rank or an alpha must fit a site."""
        for option in ("rank_pattern", "alpha_pattern"):
            resolve_patterns([pattern for pattern, _ in getattr(self, option)], names, option)

    def rank_of(self, program: Program, site: str) -> int:
        """The rank of the delta on a linear."""
        return _first(program, self.rank_pattern, site, self.r)

    def scale_of(self, program: Program, site: str) -> float:
        """The factor of `B A` on a linear."""
        rank = self.rank_of(program, site)
        alpha = _first(program, self.alpha_pattern, site, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def factors(self, program: Program, linear: Linear, stem: str) -> dict[str, torch.Tensor]:
        """A uniform, B zero."""
        rank = self.rank_of(program, linear.name)
        a = uniform(program, f"{self.seed} {stem}", (rank, linear.in_features))
        return {"a": a, "b": torch.zeros(linear.out_features, rank)}

    def options(self) -> Mapping[str, Any]:
        """The dropout in front of A."""
        return {DROPOUT: self.dropout}

    def biases(self, program: Program, structure: Structure, chosen: Sequence[Linear]) -> list[str]:
        """The biases that train whole."""
        if self.bias == "lora_only":
            return [linear.bias for linear in chosen if linear.bias is not None]
        return biases_of(program) if self.bias == "all" else []

    def check_numbers(self, program: Program, delta: Delta) -> None:
        """Its dropout, its scale and its learning rates must be those of this pass."""
        super().check_numbers(program, delta)
        for key, node in delta.tensors.items():
            wanted = self.lr_ratio if key in self.family.faster else 1.0
            for item in upstream(node):
                factor = program.lr_factors.get(str(item.target), 1.0)
                if item.op == "get_attr" and factor != wanted and str(item.target) not in program.frozen:
                    raise VerificationError(
                        f"{item.target} trains at {factor:g} times the learning rate, and lr_ratio says {wanted:g}"
                    )
        scale = self.scale_of(program, delta.site)
        if not math.isclose(delta.numbers["scale"], scale):
            raise VerificationError(
                f"{delta.site}: its delta is scaled by {delta.numbers['scale']}, and alpha and r say {scale}"
            )


def _first(program: Program, patterns: Sequence[tuple[str, Number]], site: str, otherwise: Number) -> Number:
    """The value of the first pattern that fits a site, by one of its names."""
    names = [site, *(alias for alias, name in program.ties.items() if name == site)]
    fitting = (value for pattern, value in patterns if any(means(name, pattern) for name in names))
    return next(fitting, otherwise)
