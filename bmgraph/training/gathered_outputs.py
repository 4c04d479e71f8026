"""What a loss reads of the rows of all ranks: `Torch(gather=("name",))`, for losses that contrast each row with all others.

A gathered value holds the rows of all ranks in the order of ranks; its gradient goes back to the rank that each row is of,
summed over ranks. A loss of gathered values alone is computed whole by every rank, of which each counts its part: the sum over
ranks of S / R and N / R is S and N. A loss that contrasts own rows with gathered ones adds up over ranks as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bmgraph.distributed.process_group import Ranks
from bmgraph.errors import InputError
from bmgraph.ir.program import Program
from bmgraph.training.call_gradients import Value
from bmgraph.training.joint_assembly import JointAssembly
from bmgraph.utils.torch_internals import FakeTensorMode, fake_inputs

collective = torch.ops._c10d_functional

_HINT = 101
"""A number of gathered rows for tracing: no other size has it."""


@dataclass(frozen=True)
class Gathering:
    """The outputs and inputs of a program that a loss reads of all ranks, by name; none of them on one rank."""

    names: tuple[str, ...]
    ranks: Ranks

    def of(self, assembly: JointAssembly, values: Mapping[str, Value]) -> dict[str, Any]:
        """The values by name, with the rows of all ranks of those that are gathered."""
        given = self.ranks.size, self.ranks.group
        return {
            name: assembly.add(gather_rows, (value, *given), {}) if name in self.names else value
            for name, value in values.items()
        }

    def refusal(self, reason: str) -> InputError:
        """The error of a loss that does not add up over ranks."""
        return InputError(
            f"gather={self.names}: ranks cannot share this loss: {reason}; gather all outputs and inputs of which it reads "
            "rows of other ranks, or all that it reads"
        )

    def new_size(self, mode: FakeTensorMode) -> Any:
        """A free number of rows, which is no rank's own; to be made outside of the mode."""
        return fake_inputs(mode, {"rows": ([(_HINT, True)], torch.int64)})["rows"].shape[0]

    def fakes(self, values: Mapping[str, Value], rows: Any) -> dict[str, Any]:
        """Fake values by name; those that are gathered have so many rows."""
        return {
            name: torch.empty((rows, *value.fake.shape[1:]), dtype=value.fake.dtype, device=value.fake.device)
            if name in self.names
            else value.fake
            for name, value in values.items()
        }

    def terms(
        self,
        loss: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        outputs: Mapping[str, torch.Tensor],
        inputs: Mapping[str, torch.Tensor],
        whole: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a loss computes of tensors, of which it is given the rows of all ranks; this rank's part if it is `whole`."""
        outputs, inputs = (
            {
                name: gather_rows(value, self.ranks.size, self.ranks.group) if name in self.names else value
                for name, value in values.items()
            }
            for values in (outputs, inputs)
        )
        total, count = loss(outputs, inputs)
        return _part(total, count, self.ranks.size) if whole else (total, count)

    def part(self, assembly: JointAssembly, terms: Sequence[Value]) -> Any:
        """The part of this rank of a sum and a count that every rank computes whole."""
        return assembly.add(_part, (*terms, self.ranks.size), {})


def check_gather(program: Program, loss: object, names: Sequence[str], accumulate: int) -> None:
    """Raise InputError unless a loss can read the rows of all ranks of these outputs and inputs."""
    if not callable(loss):
        raise InputError(
            f"gather={tuple(names)} with loss={loss!r}: a loss that the model computes reads its own rows alone; return what is "
            "gathered as outputs, and give loss= a function of (outputs, inputs), which is called with the rows of all ranks"
        )
    if accumulate > 1:
        raise InputError(
            f"gather={tuple(names)} with accumulate={accumulate}: each micro-batch would be contrasted with itself alone, which is "
            "another loss than that of the whole batch: train with accumulate=1, and Remat() or more ranks if memory is short"
        )
    shapes = {spec.name: spec.shape for spec in (*program.outputs, *program.inputs)}
    for name in names:
        if name not in shapes:
            known = ", ".join(map(repr, shapes))
            raise InputError(f"gather: there is no output or input {name!r} (there are {known})")
        if not shapes[name]:
            raise InputError(f"gather: {name!r} is a scalar, which has no rows")


def gather_rows(rows: torch.Tensor, ranks: int, group: str) -> torch.Tensor:
    """x[B, ...] of each rank -> [ranks * B, ...]: the rows of all ranks in their order; B is the same on all."""
    call: Callable[..., torch.Tensor] = _GatherRows.apply
    return call(rows, ranks, group)


class _GatherRows(torch.autograd.Function):
    """All-gather, whose backward is the reduce-scatter of the sum."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, ranks: int, group: str) -> torch.Tensor:
        ctx.given = ranks, group
        sent = collective.all_gather_into_tensor(rows.contiguous(), ranks, group)
        return collective.wait_tensor(sent)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        sent = collective.reduce_scatter_tensor(gradient.contiguous(), "sum", *ctx.given)
        return collective.wait_tensor(sent), None, None


def _part(total: torch.Tensor, count: torch.Tensor, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    return total / ranks, count.to(torch.float64) / ranks
