"""LoRA: train a low-rank update next to frozen linears."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from bmgraph.analysis.structure.sites import Linear
from bmgraph.deltas.family import Change
from bmgraph.deltas.low_rank import LowRank
from bmgraph.ir.program import Program
from bmgraph.passes.deltas.rank_pass import RankPass


@dataclass(frozen=True, repr=False)
class LoRA(RankPass):
    """Add `alpha / r * B A x` to the output of linears, and freeze all parameters but A [r, in] and B [out, r].

    targets, roles, exclude, layers, modules_to_save: as in `DeltaPass`; the default is attention queries and values. Where a
    role is a range of a fused linear's outputs, the delta changes that range alone. rslora, rank_pattern, alpha_pattern,
    dropout, seed, bias, lr_ratio (LoRA+): as in `RankPass`. B is zero at first, so a new delta changes nothing. PEFT's names of options are
    taken too (`lora_alpha`, `target_modules`, ...).

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

    family: ClassVar[type[LowRank]] = LowRank

    def new_change(self, program: Program, linear: Linear, stem: str, source: fx.Node | None) -> Change:
        """A uniform, B zero."""
        return Change(self.factors(program, linear, stem), {"scale": self.scale_of(program, linear.name)})

    def told(self, change: Change) -> str:
        """Its rank."""
        return f"rank {change.tensors['a'].shape[0]}"
