"""StoreCodes: what `QAT` trained, as integer codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bmgraph.ir.program import Program
from bmgraph.lowering.store_codes import store_codes, trained_sites
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import ModelPass
from bmgraph.passes.qat.features import FAKE_QUANTIZED


@dataclass(frozen=True, repr=False)
class StoreCodes(ModelPass):
    """Store each weight that `QAT` trained as its codes and scales, bit by bit the numbers that it was trained with.

    Engines do so by themselves; run it for a program on torch that is as small as its codes. The weights then no longer train.
    A pass that rounds again (`Quantize`) begins with it, so trained codes stay.

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.passes import QAT, StoreCodes
        >>> program = bg.capture(torch.nn.Linear(32, 16), (torch.randn(3, 32),))
        >>> small = bg.Pipeline([QAT("int4", smallest=16), StoreCodes()]).run(program)
        >>> sorted(small.parameters)
        ['bias', 'weight_codes', 'weight_scale']
    """

    requires: ClassVar[frozenset[str]] = frozenset({FAKE_QUANTIZED})
    provides: ClassVar[frozenset[str]] = frozenset({"quantized"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"quantized"})

    def run(self, program: Program, context: Context) -> Program:
        """Replace rounded weights by codes."""
        for site in trained_sites(program):
            context.edited(site, "the codes that it was trained with")
        store_codes(program, str(self))
        return program
