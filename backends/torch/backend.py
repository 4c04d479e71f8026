"""How a program runs on torch: the configuration of trainers and of torch engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from bmgraph.errors import InputError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.pass_base import Pass
from bmgraph.pass_manager.report import Report
from bmgraph.pass_manager.target import TORCH, Target
from bmgraph.passes.kvcache.kvcache import KVCache
from bmgraph.training.loss_terms import Loss
from bmgraph.training.lr_schedules import Schedule
from bmgraph.training.optimizers import Optimizer

PRECISIONS = ("fp32",)


@dataclass(frozen=True)
class Torch:
    """How to run on torch.

    With an `optimizer` (`AdamW(lr=...)`) a program becomes a trainer: `schedule` is how its learning rate goes,
    `clip_norm` the largest norm of all gradients together, `loss` the output to minimise or a function of
    (outputs, inputs) that returns a summed loss and how many items it is the sum of, `passes` are of the step stage
    (`ZeRO(3)`), and `seed` makes dropout repeatable. Without an optimizer it becomes an engine on torch; `generate`
    gives it `generate`.
    """

    name: ClassVar[str] = "torch"
    stages: ClassVar[tuple[str, ...]] = ("model", "step")
    target: ClassVar[Target] = TORCH
    every_rank_lowers: ClassVar[bool] = True
    """Nothing is translated, so each rank makes its own instead of loading what rank 0 made."""

    optimizer: Optimizer | None = None
    schedule: Schedule | None = None
    precision: str = "fp32"
    clip_norm: float | None = None
    loss: str | Loss = "loss"
    passes: tuple[Pass, ...] = ()
    seed: int = 0
    generate: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InputError(f"precision={self.precision!r}: choose one of {', '.join(PRECISIONS)}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise InputError(f"clip_norm={self.clip_norm}: give a number above 0, or None for no bound")
        if self.optimizer is not None and not isinstance(self.optimizer, Optimizer):
            raise InputError(f"optimizer={self.optimizer!r}: give one of ours, such as AdamW(lr=1e-3)")
        if self.optimizer is not None and self.generate:
            raise InputError(
                "a trainer does not generate: compile trainer.program() with Torch(generate=True)"
            )
        for item in self.passes:
            if not isinstance(item, Pass) or item.acts_on != "step":
                raise InputError(f"passes={item!r}: give passes of the step stage, such as ZeRO(3)")

    @property
    def appended(self) -> tuple[Pass, ...]:
        """The passes of the model stage that this backend needs last."""
        return (KVCache(),) if self.generate else ()

    def build(self, program: Program, report: Report) -> Any:
        """A trainer where there is an optimizer, else a torch engine."""
        if self.optimizer is None:
            from bmgraph.runtime.torch.engine import TorchEngine

            return TorchEngine(program, report)
        from bmgraph.backends.torch.build_trainer import build_trainer

        return build_trainer(self, program, report)
