"""Adapters behind linears, in a row with them (Houlsby et al. 2019, arXiv:1902.00751)."""

from __future__ import annotations

from bmgraph.deltas.bottleneck import PlainBottleneckFamily
from bmgraph.ir.node_role import delta_role


class AdapterFamily(PlainBottleneckFamily):
    """Two matrices, down [r, out] and up [out, r], that read the output of the linear."""

    name = "adapter"
    roles = (delta_role("adapter"),)
    peft_type = "ADAPTER"
