"""IA3: train scales of keys, values and neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from bmgraph.analysis.site_filter import means, resolve_patterns
from bmgraph.analysis.structure.sites import Linear
from bmgraph.deltas.family import Change
from bmgraph.deltas.ia3 import L_INPUT, IA3Family, L
from bmgraph.ir.program import Program
from bmgraph.passes.deltas.delta_pass import DeltaPass


@dataclass(frozen=True, repr=False)
class IA3(DeltaPass):
    """Multiply the outputs of linears by scales [out], or their inputs by scales [in], and freeze all else.

    targets, roles, exclude, layers, modules_to_save: as in `DeltaPass`; the default is attention keys and values, and the
    last linear of feed-forwards. feedforward_modules: patterns, as in targets, of the linears whose input is scaled; by
    default the last linears of feed-forwards, as they are found in the structure. All scales are one at first, so a new
    delta changes nothing. Merging is exact.

    Raises PassError where a pattern matches nothing. Source: Liu et al. 2022 (arXiv:2205.05638).

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.passes import IA3
        >>> program = bg.capture(torch.nn.Linear(6, 4), (torch.randn(3, 6),))
        >>> tuned = bg.Pipeline([IA3(targets=("*",))]).run(program)
        >>> sorted(set(tuned.parameters) - tuned.frozen)
        ['weight_ia3_l']
    """

    family: ClassVar[type[IA3Family]] = IA3Family
    default_roles: ClassVar[tuple[str, ...]] = ("attention.k", "attention.v", "feedforward.down")

    feedforward_modules: tuple[str, ...] = field(default=(), kw_only=True)

    def check_names(self, names: Sequence[str]) -> None:
        """Each pattern of a linear whose input is scaled must fit one."""
        resolve_patterns(self.feedforward_modules, names, "feedforward_modules")

    def new_change(self, program: Program, linear: Linear, stem: str, source: fx.Node | None) -> Change:
        """Ones."""
        on_input = linear.role == "feedforward.down"
        if self.feedforward_modules:
            on_input = any(means(linear.name, pattern) for pattern in self.feedforward_modules)
        if on_input:
            return Change({L_INPUT: torch.ones(linear.in_features)})
        return Change({L: torch.ones(linear.out_features)})

    def told(self, change: Change) -> str:
        """What is scaled."""
        return "scales of inputs" if L_INPUT in change.tensors else "scales"
