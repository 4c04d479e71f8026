"""Vector-based random matrix adaptation (VeRA) of linears: their form in a graph, their arithmetic, and PEFT's format.

Kopiczko et al. 2024 (arXiv:2310.11454). All linears share two random matrices that do not train; each has two vectors:

    change = mul(linear(mul(linear(dropout(x), A[:, :in]), d), B[:out]), b)      A [r, most inputs], B [most outputs, r], d [r], b [out]
    total  = add(linear(x, W, bias), change)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from bmgraph.deltas.delta_calls import DeltaCalls
from bmgraph.deltas.family import PREFIX, Change, Part, Saved
from bmgraph.deltas.file_values import check_values
from bmgraph.deltas.forms import Hole
from bmgraph.deltas.linear_family import ROWS, LinearFamily
from bmgraph.deltas.low_rank_format import DROPOUT, is_transposed
from bmgraph.deltas.module_matching import Sizes
from bmgraph.deltas.one_each import one_each
from bmgraph.deltas.peft_config import SAVED, check_known, share
from bmgraph.deltas.row_stacks import axes_of, row_vector, stacked_entries
from bmgraph.errors import BundleError
from bmgraph.ir.node_role import delta_role
from bmgraph.ir.program import Program

aten = torch.ops.aten

A, B, LAMBDA_D, LAMBDA_B = "a", "b", "lambda_d", "lambda_b"
"""Names of a change's tensors: the shared matrices, and the vectors d and b."""

READ = frozenset(
    {"r", "target_modules", "exclude_modules", "projection_prng_key", "save_projection", "vera_dropout", "d_initial",
     "fan_in_fan_out", "init_weights"}
)  # fmt: skip
"""PEFT options that are read, or that change nothing in what a saved adapter computes."""

MATRICES = {A: "base_model.vera_A", B: "base_model.vera_B"}
"""Key of a shared matrix -> its name in PEFT's files."""


class VeRAFamily(LinearFamily):
    """Changes diag(b) B diag(d) A of weights, of which A and B are random, frozen and shared."""

    name = "vera"
    roles = (delta_role("vera"),)
    peft_type = "VERA"
    adds = True
    keys = (A, B, LAMBDA_D, LAMBDA_B, ROWS)
    optional = (ROWS,)
    axes = {A: 2, B: 2, LAMBDA_D: 1, LAMBDA_B: 1, ROWS: 2}
    shared = (A, B)
    frozen = (A, B)
    alike = (A, B)
    choices = MappingProxyType({DROPOUT: (0.0, Hole(DROPOUT))})

    def build(
        self, call: DeltaCalls, tensors: Mapping[str, fx.Node], change: Change, options: Mapping[str, Any]
    ) -> fx.Node:
        """Add the change to the output."""
        x, scales = call.input, tensors[LAMBDA_B]
        if options.get(DROPOUT):
            x = call(aten.dropout.default, x, options[DROPOUT], True)
        if ROWS in tensors:
            scales = call(aten.mul.Tensor, scales, call(aten.squeeze.dim, tensors[ROWS], 1))
        a = call(aten.slice.Tensor, tensors[A], 1, 0, call.in_features)
        b = call(aten.slice.Tensor, tensors[B], 0, 0, call.out_features)
        down = call(aten.mul.Tensor, call(aten.linear.default, x, a), tensors[LAMBDA_D])
        up = call(aten.linear.default, down, b)
        return call.end(aten.add.Tensor, call.linear, call(aten.mul.Tensor, up, scales))

    def sizes(self, change: Change) -> Sizes:
        """As many outputs as entries of b."""
        return change.tensors[LAMBDA_B].shape[0], None

    def describe(self, change: Change) -> str:
        """Its rank."""
        return f"vectors of {change.tensors[LAMBDA_D].shape[-1]} and {change.tensors[LAMBDA_B].shape[-1]}"

    def folded(
        self, change: Change, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """W + diag(b) B diag(d) A, and the same bias."""
        t, (outputs, inputs) = change.tensors, weight.shape
        scales = t[LAMBDA_B] * t[ROWS][:, 0] if ROWS in t else t[LAMBDA_B]
        moved = (scales[:, None] * t[B][:outputs]) @ (t[LAMBDA_D][:, None] * t[A][:, :inputs])
        return weight + moved, bias

    def stacked(self, changes: Mapping[int, Change], count: int) -> Change:
        """d [count + 1, r] and b [count + 1, out], zeros for no delta."""
        entries = {
            number: {key: change.tensors[key] for key in (LAMBDA_D, LAMBDA_B)}
            for number, change in changes.items()
        }
        return Change(stacked_entries(entries, count))

    def build_rows(self, call: DeltaCalls, x: fx.Node, chosen: Mapping[str, fx.Node]) -> fx.Node:
        """Add the change of each row: products with the matrices of all, scaled by the vectors of the row."""
        a = call(aten.slice.Tensor, chosen[A], 1, 0, call.in_features)
        b = call(aten.slice.Tensor, chosen[B], 0, 0, call.out_features)
        inner, outer = (row_vector(call, chosen[key], axes_of(x)) for key in (LAMBDA_D, LAMBDA_B))
        down = call(aten.mul.Tensor, call(aten.linear.default, x, a), inner)
        up = call(aten.linear.default, down, b)
        return call.end(aten.add.Tensor, call.linear, call(aten.mul.Tensor, up, outer))

    def saved(self, program: Program) -> Saved | None:
        """PEFT's configuration, vectors and matrices."""
        modules = one_each(self, program)
        if not modules:
            return None
        tensors = {}
        for module, delta in modules.items():
            change = delta.change(program)
            tensors[f"{PREFIX}{module}.vera_lambda_d"] = change.tensors[LAMBDA_D]
            tensors[f"{PREFIX}{module}.vera_lambda_b"] = change.tensors[LAMBDA_B]
        tensors |= {name: change.tensors[key] for key, name in MATRICES.items()}
        config = {
            **SAVED,
            "r": change.tensors[A].shape[0],
            "target_modules": list(modules),
            "vera_dropout": delta.options[DROPOUT],
            "save_projection": True,
            "fan_in_fan_out": all(map(is_transposed, modules.values())),
            "bias": "none",
        }
        return Saved(self, config, tensors)

    def loaded(self, path: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> Part:
        """Read PEFT's configuration, vectors and matrices."""
        check_known(path, config, READ, self.name)
        missing = [name for name in MATRICES.values() if name not in tensors]
        if missing:
            raise BundleError(
                f"{path} holds no {missing[0]}: PEFT would draw it anew from a random generator; save it with save_projection=True"
            )
        shared = {key: tensors.pop(name) for key, name in MATRICES.items()}
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name in list(tensors):
            module, _, end = name.removeprefix(PREFIX).rpartition(".")
            if name.startswith(PREFIX) and end in ("vera_lambda_d", "vera_lambda_b"):
                found.setdefault(module, dict(shared))[end.removeprefix("vera_")] = tensors.pop(name)
        changes = {module: _change(path, module, own) for module, own in found.items()}
        return Part(self, path, changes, {DROPOUT: share(path, config, "vera_dropout")})


def _change(path: Path, module: str, own: dict[str, torch.Tensor]) -> Change:
    """The change of a module. Raises BundleError for tensors that are missing, or do not fit."""
    for key, value in own.items():
        if not value.is_floating_point():
            raise BundleError(f"{path}: {key} of {module} is {value.dtype}, not floating-point numbers")
        check_values(path, f"{key} of {module}", value)
    ranks = {own[A].shape[0], own[B].shape[-1], *(own[key].shape[0] for key in (LAMBDA_D,) if key in own)}
    axes = {key: value.dim() for key, value in own.items()}
    if axes != {key: VeRAFamily.axes[key] for key in (A, B, LAMBDA_D, LAMBDA_B)} or len(ranks) > 1:
        shapes = ", ".join(f"{key}{list(value.shape)}" for key, value in own.items())
        raise BundleError(
            f"{path}: {module} has {shapes}: expected a [r, in], b [out, r], lambda_d [r] and lambda_b [out]"
        )
    if own[LAMBDA_B].shape[0] > own[B].shape[0]:
        raise BundleError(
            f"{path}: {module} has {len(own[LAMBDA_B])} outputs, and the shared matrix {own[B].shape[0]}"
        )
    return Change(own)
