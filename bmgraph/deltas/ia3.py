"""Learned scales of activations (IA3) on linears: their form in a graph, their arithmetic, and PEFT's format.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning" (arXiv:2205.05638).
A delta scales the output of a linear (keys and values), or its input (the neurons of a feed-forward):

    total = mul(linear(x, W, b), l)                                         l [out]
    total = mul(x, l_input), and the linear reads it instead of x           l_input [in]

On some outputs alone, `add(mul(sub(l, 1), squeeze(rows)), 1)` replaces l; rows is bool[out, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.weight_sites import Weight
from bmgraph.deltas.delta_calls import DeltaCalls
from bmgraph.deltas.family import PREFIX, Change, Delta, Part, Saved
from bmgraph.deltas.file_values import check_values
from bmgraph.deltas.linear_family import ROWS, LinearFamily
from bmgraph.deltas.low_rank_format import is_transposed
from bmgraph.deltas.module_matching import Sizes
from bmgraph.deltas.one_each import one_each
from bmgraph.deltas.peft_config import SAVED, check_known
from bmgraph.deltas.row_stacks import axes_of, row_vector, stacked_entries
from bmgraph.deltas.weighted_sum import Combination, Weighted, sum_of_tensors
from bmgraph.errors import BundleError, PassError
from bmgraph.ir.node_role import INPUT, delta_role
from bmgraph.ir.program import Program

aten = torch.ops.aten

L, L_INPUT = "l", "l_input"
"""Names of a change's tensor: the scales of outputs [out], or of inputs [in]."""

READ = frozenset(
    {"target_modules", "feedforward_modules", "exclude_modules", "fan_in_fan_out", "init_ia3_weights"}
)
"""PEFT options that are read, or that change nothing in what a saved adapter computes."""


class IA3Family(LinearFamily):
    """Scales of the outputs of a linear, or of its inputs."""

    name = "ia3"
    roles = (delta_role("ia3"), delta_role(f"ia3{INPUT}"))
    peft_type = "IA3"
    keys = (L, L_INPUT, ROWS)
    optional = (L, L_INPUT, ROWS)
    axes = {L: 1, L_INPUT: 1, ROWS: 2}

    def role_for(self, change: Change) -> str:
        """The second role for a delta on the input."""
        return self.roles[L_INPUT in change.tensors]

    def build(
        self, call: DeltaCalls, tensors: Mapping[str, fx.Node], change: Change, options: Mapping[str, Any]
    ) -> fx.Node:
        """Scale the output, or the input."""
        if L_INPUT in tensors:
            return call.end_input(aten.mul.Tensor, call.input, tensors[L_INPUT])
        scales: Any = tensors.get(L)
        if ROWS in tensors:
            excess = call(aten.sub.Tensor, scales, 1)
            rows = call(aten.squeeze.dim, tensors[ROWS], 1)
            scales = call(aten.add.Tensor, call(aten.mul.Tensor, excess, rows), 1)
        return call.end(aten.mul.Tensor, call.linear, scales)

    def sizes(self, change: Change) -> Sizes:
        """As many outputs, or inputs, as scales."""
        count = len(next(value for key, value in change.tensors.items() if key != ROWS))
        return (None, count) if L_INPUT in change.tensors else (count, None)

    def describe(self, change: Change) -> str:
        """How many scales of what."""
        what = "inputs" if L_INPUT in change.tensors else "outputs"
        scales = change.tensors[L_INPUT if L_INPUT in change.tensors else L]
        return f"scales of {scales.shape[-1]} {what}"

    def folded(
        self, change: Change, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows of the weight and the bias scaled, or columns of the weight."""
        if L_INPUT in change.tensors:
            return weight * change.tensors[L_INPUT], bias
        scales = change.tensors[L]
        if ROWS in change.tensors:
            scales = torch.where(change.tensors[ROWS][:, 0], scales, torch.ones_like(scales))
        return weight * scales[:, None], None if bias is None else bias * scales

    def why_not_folded(self, program: Program, delta: Delta, weight: Weight) -> str:
        """Scales of inputs do not fit a weight whose inputs were copied."""
        inputs = weight.node.meta["val"].shape[1 - weight.channel_axis]
        if L_INPUT not in delta.tensors or inputs == len(delta.tensors[L_INPUT].meta["val"]):
            return ""
        return f"its weight has {inputs} inputs, of which SplitOutliers copied some: merge before it"

    def stacked(self, changes: Mapping[int, Change], count: int) -> Change:
        """Scales [count + 1, out], or [count + 1, in] of inputs, of ones for no delta."""
        keys = {key for change in changes.values() for key in change.tensors}
        if len(keys) > 1:
            raise PassError(
                "of the deltas of the family 'ia3' on one linear some scale its inputs and others its outputs, and rows cannot choose "
                "between these: train them with the same feedforward_modules"
            )
        entries = {number: change.tensors for number, change in changes.items()}
        return Change(stacked_entries(entries, count, fill=1.0))

    def build_rows(self, call: DeltaCalls, x: fx.Node, chosen: Mapping[str, fx.Node]) -> fx.Node:
        """Scale the output of each row, or its input."""
        (scales,) = (row_vector(call, tensor, axes_of(x)) for tensor in chosen.values())
        if L_INPUT in chosen:
            return call.end_input(aten.mul.Tensor, call.input, scales)
        return call.end(aten.mul.Tensor, call.linear, scales)

    def summed(self, changes: Weighted, how: Combination, rank: int | None, module: str) -> Change:
        """The weighted sum of scales, as PEFT has it: a delta of scales again where the weights sum to 1."""
        if how != "linear":
            raise PassError(
                f"scales of the family 'ia3' are added up as they are: give combination='linear', not {how!r}"
            )
        if len({tuple(sorted(change.tensors)) for _, change in changes}) > 1:
            raise PassError(f"{module}: one delta scales its inputs, and another its outputs")
        return sum_of_tensors(changes)

    def saved(self, program: Program) -> Saved | None:
        """PEFT's configuration and scales, [out, 1] or [1, in]."""
        tensors: dict[str, torch.Tensor] = {}
        scaled_inputs = []
        modules = one_each(self, program)
        for module, delta in modules.items():
            change = delta.change(program)
            if L_INPUT in change.tensors:
                scaled_inputs.append(module)
                tensors[f"{PREFIX}{module}.ia3_l"] = change.tensors[L_INPUT][None]
            else:
                tensors[f"{PREFIX}{module}.ia3_l"] = change.tensors[L][:, None]
        if not tensors:
            return None
        config = {
            **SAVED,
            "target_modules": list(modules),
            "feedforward_modules": scaled_inputs,
            "fan_in_fan_out": all(map(is_transposed, modules.values())),
        }
        return Saved(self, config, tensors)

    def loaded(self, path: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> Part:
        """Read PEFT's configuration and scales."""
        check_known(path, config, READ, self.name)
        changes: dict[str, Change] = {}
        for key in [key for key in tensors if key.startswith(PREFIX) and key.endswith(".ia3_l")]:
            module, scales = key.removeprefix(PREFIX).removesuffix(".ia3_l"), tensors.pop(key)
            check_values(path, f"ia3_l of {module}", scales)
            if scales.dim() != 2 or 1 not in scales.shape or not scales.is_floating_point():
                raise BundleError(
                    f"{path}: ia3_l of {module} is {scales.dtype} of shape {list(scales.shape)}: expected numbers [out, 1] or "
                    "[1, in]"
                )
            on_input = scales.shape[0] == 1 and (scales.shape[1] > 1 or _names(config, module))
            changes[module] = Change({L_INPUT if on_input else L: scales.flatten()})
        return Part(self, path, changes)


def _names(config: Mapping[str, Any], module: str) -> bool:
    """Whether a configuration lists a module among those whose input is scaled."""
    named = config.get("feedforward_modules") or []
    return isinstance(named, list) and any(f".{module}".endswith(f".{name}") for name in named)
