"""DoRA: train a low-rank update, and the norm of each row, next to frozen linears."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.structure.sites import Linear
from bmgraph.deltas.dora import DoRAFamily
from bmgraph.deltas.family import Change
from bmgraph.deltas.low_rank_format import MAGNITUDE
from bmgraph.ir.program import Program
from bmgraph.passes.deltas.rank_pass import RankPass


@dataclass(frozen=True, repr=False)
class DoRA(RankPass):
    """Let linears multiply by W + scale * B A, with its rows scaled to norms m [out] that train, and freeze all else.

    Options as in `LoRA`. m starts as the norms of the rows of W, and B as zero, so that a new delta changes nothing. A linear
    with such a delta takes no other. The weight may be any expression (int8 codes, masked, stored [in, out]). Merging is exact.

    Raises PassError where a pattern matches nothing, and for a linear that has a delta already.
    Source: Liu et al. 2024 (arXiv:2402.09353).

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.passes import DoRA
        >>> program = bg.capture(torch.nn.Linear(6, 4), (torch.randn(3, 6),))
        >>> tuned = bg.Pipeline([DoRA(r=2, targets=("*",))]).run(program)
        >>> sorted(set(tuned.parameters) - tuned.frozen)
        ['weight_dora_a', 'weight_dora_b', 'weight_dora_magnitude']
    """

    family: ClassVar[type[DoRAFamily]] = DoRAFamily

    def new_change(self, program: Program, linear: Linear, stem: str, source: fx.Node | None) -> Change:
        """A uniform, B zero, m the norms of the rows of the weight."""
        factors = self.factors(program, linear, stem)
        magnitude = torch.empty(linear.out_features, device="meta")
        if program.device.type != "meta":
            use = linear.uses[0]
            weight: Any = next(
                node for node in program.graphs[use.graph].nodes if node.name == use.node
            ).args[1]
            magnitude = torch.linalg.vector_norm(evaluate(program, weight), 2, [1])
        return Change({**factors, MAGNITUDE: magnitude}, {"scale": self.scale_of(program, linear.name)})

    def told(self, change: Change) -> str:
        """Its rank."""
        return f"rank {change.tensors['a'].shape[0]} and magnitudes"
