"""Models made smaller by hand: zeros in place of what a program has lost, and norms over what is left."""

from __future__ import annotations

import copy

import torch
from torch import nn

from bmgraph.ir.program import Program


def with_zeros(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The tensor `old` with zeros in the rows or columns that `new` does not have."""
    axis = next(axis for axis in range(old.dim()) if old.shape[axis] != new.shape[axis])
    left = new.movedim(axis, 0).tolist()
    masked = old.clone()
    for place, row in enumerate(old.movedim(axis, 0).tolist()):
        if left and row == left[0]:
            left.pop(0)
        else:
            masked.select(axis, place).zero_()
    assert not left
    return masked


class OverKept(nn.Module):
    """A norm that sees some channels alone, and gives zeros for the others."""

    def __init__(self, norm: nn.Module, kept: torch.Tensor) -> None:
        super().__init__()
        self.norm, self.kept = copy.deepcopy(norm), kept
        for parameter in self.norm.parameters():
            parameter.data = parameter.data[kept]
        if hasattr(self.norm, "normalized_shape"):
            self.norm.normalized_shape = (len(kept),)
        self.weight = self.norm.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x f[..., D] -> f[..., D]."""
        whole = torch.zeros_like(x)
        whole[..., self.kept] = self.norm(x[..., self.kept])
        return whole


def by_hand(model: nn.Module, program: Program) -> nn.Module:
    """The model with zeros where parameters have become smaller, and norms over what is kept alone."""
    silent = copy.deepcopy(model)
    parameters = dict(silent.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        stored = program.ties.get(name, name)
        new = program.parameters.get(stored, program.buffers.get(stored))
        if new is not None and new.shape != parameter.shape and name == stored:
            parameter.data = with_zeros(parameter.data, new)
    for path, module in list(silent.named_modules()):
        own = dict(module.named_parameters(recurse=False))
        name = f"{path}.weight"
        if set(own) <= {"weight", "bias"} and name in program.parameters and own["weight"].dim() == 1:
            known = dict(model.named_parameters())
            if program.parameters[name].shape != known[name].shape:
                distinct = name if len(known[name].unique()) == len(known[name]) else f"{path}.bias"
                old, new = known[distinct], program.parameters[distinct]
                parent, _, leaf = path.rpartition(".")
                kept = torch.tensor([place for place, value in enumerate(old) if value in new])
                original = model.get_submodule(path)
                setattr(silent.get_submodule(parent), leaf, OverKept(original, kept))
    return silent
