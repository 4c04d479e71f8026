"""Weights whose storage a program shares with the model that it was captured from, and whether the model has changed them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from bmgraph.errors import InputError
from bmgraph.utils.digest import fingerprint


@dataclass(frozen=True)
class SharedWeight:
    """A weight as it was captured: torch's count of writes into it (None if it keeps none), and a digest of samples.

    Writes through `.data` are not counted, and the samples miss writes into few elements; each finds what the other misses.
    """

    tensor: torch.Tensor
    parameter: weakref.ref[torch.Tensor]
    version: int | None
    samples: str

    @classmethod
    def of(cls, tensor: torch.Tensor, parameter: nn.Parameter) -> SharedWeight:
        """The weight as it is now; `tensor` is the program's view of the model's `parameter`."""
        return cls(tensor, weakref.ref(parameter), _version(tensor), fingerprint({"": tensor}))

    @property
    def changed(self) -> bool:
        """Whether something has written into it."""
        if fingerprint({"": self.tensor}) != self.samples:
            return True
        parameter = self.parameter()
        moved = parameter is not None and not _same(parameter.data, self.tensor)
        return not moved and _version(self.tensor) != self.version  # one that moved counts writes elsewhere


def shared_weights(parameters: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, SharedWeight]:
    """The parameters of a program, by name, whose storage is the model's."""
    own = dict(model.named_parameters())
    return {
        name: SharedWeight.of(tensor, own[name])
        for name, tensor in parameters.items()
        if name in own and _same(own[name].data, tensor)
    }


def check_unchanged(parameters: Mapping[str, torch.Tensor], shared: Mapping[str, SharedWeight]) -> None:
    """Raise InputError where the model has changed weights since its capture that are still among the parameters."""
    changed = [
        name
        for name, weight in shared.items()
        if name in parameters and _same(parameters[name], weight.tensor) and weight.changed
    ]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise InputError(
            f"{', '.join(changed[:3])}{more} of the model were changed in place after the program was captured (an optimizer "
            "step, load_state_dict, a rescaled weight), and the program shares their storage: capture the model again; to "
            "keep a program of the weights as they were, save it, or capture copy.deepcopy(model), before the change"
        )


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else int(tensor._version)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same view of one storage; tensors on meta have none."""
    if "meta" in (one.device.type, other.device.type):
        return False
    return one.is_set_to(other)
