"""A package with two families of deltas and a pass that attaches one, as an author outside of bmgraph writes it."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.outside import installed

PACKAGE = '''
"""Scaled residuals: y = x + s * f(x)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from bmgraph.api import (
    Change, Delta, Effect, LinearFamily, ModelPass, NewDelta, attach_all, check_backbone_frozen, delta_base, delta_role, find,
    matches, module_tensors, of_no_family, plain_loaded, plain_saved, train_whole, with_changed_weights,
)

aten = torch.ops.aten


class ScaledResidual(LinearFamily):
    """mul(linear, s) with s [out] or [1], 1 at first."""

    name = "scaled_residual"
    roles = (delta_role("scaled_residual"),)
    peft_type = "SCALED_RESIDUAL"
    keys = ("scale",)

    def build(self, call, tensors, change, options):
        return call.end(aten.mul.Tensor, call.linear, tensors["scale"])

    def read(self, total):
        scale = total.args[1]
        if total.target is not aten.mul.Tensor or scale.op != "get_attr":
            raise of_no_family(total, "mul(linear, scale)")
        return Delta(self, str(total.meta["site"]), delta_base(total), total, tensors={"scale": scale})

    def sizes(self, change):
        count = change.tensors["scale"].shape[0]
        return (None if count == 1 else count), None

    def describe(self, change):
        return f"{change.tensors['scale'].shape[-1]} scales"

    def folded(self, change, weight, bias):
        scale = change.tensors["scale"]
        return weight * scale[:, None], None if bias is None else bias * scale

    def stacked(self, changes, count):
        scales = [change.tensors["scale"] for change in changes.values()]
        stack = torch.ones(count + 1, max(len(scale) for scale in scales))
        for number, scale in zip(changes, scales):
            stack[number] = scale
        return Change({"scale": stack})

    def build_rows(self, call, x, chosen):
        scale = chosen["scale"]
        for _ in range(x.meta["val"].dim() - 2):
            scale = call(aten.unsqueeze.default, scale, 1)
        return call.end(aten.mul.Tensor, call.linear, scale)

    def saved(self, program):
        return plain_saved(self, program)

    def loaded(self, path, config, tensors):
        return plain_loaded(self, path, config, tensors)


class Shift(LinearFamily):
    """add(linear, shift) with shift [out]: a bias where there may be none."""

    name = "shift"
    roles = (delta_role("shift"),)
    peft_type = "SHIFT"
    adds = True
    keys = ("shift",)

    def build(self, call, tensors, change, options):
        return call.end(aten.add.Tensor, call.linear, tensors["shift"])

    def read(self, total):
        if total.args[1].op != "get_attr":
            raise of_no_family(total, "add(linear, shift)")
        tensors = {"shift": total.args[1]}
        return Delta(self, str(total.meta["site"]), delta_base(total), total, tensors=tensors)

    def sizes(self, change):
        return change.tensors["shift"].shape[0], None

    def describe(self, change):
        return "a shift"

    def folded(self, change, weight, bias):
        return weight, change.tensors["shift"] if bias is None else bias + change.tensors["shift"]

    def stacked(self, changes, count):
        stack = torch.zeros(count + 1, len(next(iter(changes.values())).tensors["shift"]))
        for number, change in changes.items():
            stack[number] = change.tensors["shift"]
        return Change({"shift": stack})

    def build_rows(self, call, x, chosen):
        shift = chosen["shift"]
        for _ in range(x.meta["val"].dim() - 2):
            shift = call(aten.unsqueeze.default, shift, 1)
        return call.end(aten.add.Tensor, call.linear, shift)

    def saved(self, program):
        return plain_saved(self, program)

    def loaded(self, path, config, tensors):
        return plain_loaded(self, path, config, tensors)


@dataclass(frozen=True, repr=False)
class ScaleResiduals(ModelPass):
    """Scale the output of linears by a learned vector, or by one number with per="layer"; whole: modules that train whole."""

    effect: ClassVar[Effect] = "exact"
    changes: ClassVar[frozenset[str]] = frozenset({"frozen"})
    provides: ClassVar[frozenset[str]] = frozenset({"delta"})

    targets: tuple[str, ...] = ("*",)
    per: str = "channel"
    whole: tuple[str, ...] = ()

    def run(self, program, context):
        family, added = ScaledResidual(), []
        train_whole(program, module_tensors(program, self.whole, "whole"))
        for linear in find(program).linears:
            if matches(linear.name, self.targets):
                scale = torch.ones(linear.out_features if self.per == "channel" else 1)
                stem = family.free_stem(program, linear.name, taken=[new.stem for _, new in added])
                added.append((linear, NewDelta(family, linear.name, stem, Change({"scale": scale}))))
                context.edited(linear.name, f"{len(scale)} scales")
        attach_all(program, added, by=str(self))
        return program

    def prove(self, before, after, proof, context):
        check_backbone_frozen(after)
        found, changes = after.clone(), []
        for delta in ScaledResidual().recognise(after.graph):
            name = str(delta.tensors["scale"].target)
            if name not in before.parameters:
                found.parameters[name] = torch.linspace(0.5, 2, after.parameters[name].numel())
                changes.append((delta.linear.name, delta.family, Change({"scale": found.parameters[name]})))
        proof.same(with_changed_weights(before, changes), found, "an output is not scaled", slack=10)
'''


ENTRY_POINTS = (
    "[bmgraph.deltas]\nscaled_residual = scaled_residual:ScaledResidual\nshift = scaled_residual:Shift\n"
)


def install_families(folder: Path) -> None:
    """Leave the package in a folder as `pip install` does."""
    installed(folder, ENTRY_POINTS, {"scaled_residual": PACKAGE})
