"""The configuration `Torch`: options of trainers and torch engines, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self, cast, overload

from bmgraph.backends.backend_base import Backend, Made
from bmgraph.errors import InputError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.pass_base import ModelPass, Stage, StepPass
from bmgraph.pass_manager.pass_manager import PassManager
from bmgraph.pass_manager.report import Report
from bmgraph.passes.kvcache.kvcache import KVCache
from bmgraph.training.loss_scale import LossScale
from bmgraph.training.loss_terms import Loss
from bmgraph.training.lr_schedules import Schedule
from bmgraph.training.optimizers import Optimizer
from bmgraph.training.precision import DTYPES, MAX_SKIPS, POLICIES, STOP, Precision

if TYPE_CHECKING:
    from bmgraph.runtime.torch.engine import TorchEngine
    from bmgraph.runtime.training.trainer import Trainer

BATCHES = ("whole", "rank")
LONGEST_TIMEOUT = 24 * 3600


@dataclass(frozen=True)
class Torch(Backend[Made]):
    """Run a program on torch: as a trainer if there is an `optimizer`, else as an engine.

    optimizer: such as `AdamW(lr=1e-3)`, `SGD` or `Lion`, with fused kernels where torch has them. schedule: scales its
    learning rate over the steps. precision: what the step computes in; with "bf16" and "fp16" matrix products are in half
    precision, norms, softmax, sums and losses in fp32, and so are the optimizer's state and its master of each trained
    parameter. clip_norm: the maximum global gradient norm; None does not clip. accumulate: the number of micro-batches that
    `step` splits its batch into, by rows, one after another; loss and gradients are those of the whole batch. reduce_dtype:
    what gradients are summed in over ranks, "fp32" or, for half the traffic, "bf16". loss_scale: the dynamic loss scale of
    "fp16". on_nan: what to do if the loss or a gradient is not finite, "stop" with an error or "skip" the step and say so
    in its result; max_skips: so many one after the other at most, then it is an error (overflows in fp16 that the loss
    scale mends do not count). loss: the name of the output to minimise, or a function of (outputs, inputs) that returns a
    loss summed over items and the number of items. passes: of the step stage, such as `ZeRO(3)`. seed: makes dropout
    reproducible. batch: what each rank gives to `step`, the "whole" batch or rows of its own ("rank"). timeout: seconds
    that ranks wait for each other in a step (ten times as long while building, in the first step and while files are read)
    before they say which of them does not answer. optimizer_in_backward: update each layer as soon as its gradient is
    summed, while backward goes on: gradients are then never all kept. Results are the same, but a step that fails in
    backward leaves parameters of which some are updated, so that a checkpoint must be loaded. gather: names of outputs (and
    inputs) of which the function `loss` is given the rows of all ranks in the order of ranks, with gradients, so that a
    contrastive loss is that of the whole batch; ranks then have equally many rows. torch_compile: by TorchInductor. Of a
    trainer's step compile what lies between matrix products, attention and communication into fused kernels, in the first step and again
    for other sizes; each is compared with the calls that it replaces, for each size, and a step runs as it is where there is no compiler.
    An engine compiles its whole graph, once for all sizes above 1 and again where a size is 0 or 1, and packs weights as its products read
    them, in a copy; it is compared with its program like any engine. generate: give the engine a KV cache and
    `generate`. devices: where an engine runs, such as ("cuda:0", "cuda:1"): each holds the layers, in order, that let the fullest of
    them be as empty as can be, by the bytes of weights, cache and activations on the example and the bytes that are free there;
    activations move between them. `engine.report` says what each holds. With the pass `Stream` it is one device, whose memory the limit
    is of. Without it, an engine runs where the program's tensors are.

    Raises InputError for an option that is not valid.

    Example:
        >>> from bmgraph.backends import AdamW, Torch
        >>> Torch(optimizer=AdamW(lr=1e-3), clip_norm=1.0).schedule is None
        True
    """

    name: ClassVar[str] = "torch"
    stages: ClassVar[tuple[Stage, ...]] = ("model", "step")
    every_rank_lowers: ClassVar[bool] = True  # building is cheap
    on_host: ClassVar[bool] = False
    streams: ClassVar[bool] = True
    why_float: ClassVar[str] = "torch's attention has no kernel that reads codes"

    optimizer: Optimizer | None = None
    schedule: Schedule | None = None
    precision: str = "fp32"
    clip_norm: float | None = None
    accumulate: int = 1
    reduce_dtype: str = "fp32"
    loss_scale: LossScale | None = None
    on_nan: str = STOP
    loss: str | Loss = "loss"
    passes: tuple[StepPass, ...] = ()
    seed: int = 0
    batch: str = "whole"
    timeout: float = 60.0
    optimizer_in_backward: bool = False
    generate: bool = False
    gather: tuple[str, ...] = ()
    max_skips: int = MAX_SKIPS
    torch_compile: bool = False
    devices: tuple[str, ...] = ()

    if (
        TYPE_CHECKING
    ):  # dataclass makes the constructor; with an optimizer it is that of a backend that builds trainers

        @overload
        def __init__(
            self: Torch[TorchEngine], optimizer: None = None, *, generate: bool = False, seed: int = 0,
            devices: str | tuple[str, ...] = (), torch_compile: bool = False,
        ) -> None: ...  # fmt: skip

        @overload
        def __init__(
            self: Torch[Trainer], optimizer: Optimizer, schedule: Schedule | None = None, precision: str = "fp32",
            clip_norm: float | None = None, accumulate: int = 1, reduce_dtype: str = "fp32",
            loss_scale: LossScale | None = None, on_nan: str = "stop", loss: str | Loss = "loss",
            passes: tuple[StepPass, ...] = (), seed: int = 0, batch: str = "whole", timeout: float = 60.0,
            optimizer_in_backward: bool = False,
            gather: str | tuple[str, ...] = (), max_skips: int = MAX_SKIPS, torch_compile: bool = False,
        ) -> None: ...  # fmt: skip

        def __init__(self, *args: object, **options: object) -> None: ...

    def __post_init__(self) -> None:
        if isinstance(self.gather, str):
            object.__setattr__(self, "gather", (self.gather,))
        if not isinstance(self.gather, tuple) or not all(isinstance(name, str) for name in self.gather):
            raise InputError(f"gather={self.gather!r}: give the names of outputs, such as ('embeds',)")
        if isinstance(self.devices, str):
            object.__setattr__(self, "devices", (self.devices,))
        if not isinstance(self.devices, tuple) or not all(isinstance(name, str) for name in self.devices):
            raise InputError(
                f"devices={self.devices!r}: give the names of devices, such as ('cuda:0', 'cuda:1')"
            )
        if self.devices and self.optimizer is not None:
            raise InputError("devices= is for engines: a trainer runs on several devices by ranks, with ZeRO")
        if self.precision not in DTYPES:
            raise InputError(f"precision={self.precision!r}: choose one of {', '.join(DTYPES)}")
        if self.reduce_dtype not in ("fp32", "bf16") or (self.precision == "fp32" != self.reduce_dtype):
            raise InputError(
                f"reduce_dtype={self.reduce_dtype!r} with precision={self.precision!r}: choose fp32, or bf16 for a step in half "
                "precision; in fp16 sums of gradients would vanish or overflow"
            )
        if self.on_nan not in POLICIES:
            raise InputError(f"on_nan={self.on_nan!r}: choose one of {', '.join(POLICIES)}")
        if self.max_skips < 1:
            raise InputError(f"max_skips={self.max_skips}: give a number of steps, 1 or more")
        if self.loss_scale is not None and (
            self.precision != "fp16" or not isinstance(self.loss_scale, LossScale)
        ):
            raise InputError(
                f"loss_scale={self.loss_scale!r}: give a LossScale, such as LossScale(start=1024.0), with precision='fp16' alone"
            )
        if self.batch not in BATCHES:
            raise InputError(f"batch={self.batch!r}: choose one of {', '.join(BATCHES)}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise InputError(f"clip_norm={self.clip_norm}: give a number above 0, or None not to clip")
        if self.accumulate < 1:
            raise InputError(f"accumulate={self.accumulate}: give the number of micro-batches, 1 or more")
        if not 0 < self.timeout <= LONGEST_TIMEOUT:
            raise InputError(
                f"timeout={self.timeout}: give the seconds that ranks wait for each other, above 0 and at most {LONGEST_TIMEOUT}"
            )
        if self.optimizer is not None and not isinstance(self.optimizer, Optimizer):
            raise InputError(
                f"optimizer={self.optimizer!r}: give an optimizer configuration of bmgraph.backends, such as AdamW(lr=1e-3)"
            )
        if self.optimizer is not None and self.generate:
            raise InputError(
                "a trainer does not generate: compile trainer.program() with Torch(generate=True)"
            )
        for step_pass in self.passes:
            if not isinstance(step_pass, StepPass):
                raise InputError(f"passes={step_pass!r}: give passes of the step stage, such as ZeRO(3)")

    @property
    def numbers(self) -> Precision:
        """The dtypes of `precision` and `reduce_dtype`."""
        return Precision(DTYPES[self.precision], DTYPES[self.reduce_dtype])

    @property
    def trains(self) -> bool:
        """Whether it builds a trainer: a captured program's backward is then compared with the model's."""
        return self.optimizer is not None

    @property
    def waits(self) -> float:
        """Seconds that ranks wait for each other in a step of a trainer; 0 without one."""
        return self.timeout if self.trains else 0.0

    @property
    def appended(self) -> tuple[ModelPass, ...]:
        """Passes of the model stage that run after the user's."""
        return (KVCache(),) if self.generate else ()

    def with_passes(self, passes: tuple[StepPass, ...]) -> Self:
        """The same configuration with these passes in front of its own."""
        return replace(self, passes=(*passes, *self.passes))

    def generating(self) -> Self:
        """The same configuration, for an engine that generates; raises InputError for a trainer's."""
        return replace(self, generate=True)

    def build(self, program: Program, report: Report, manager: PassManager | None = None) -> Made:
        """Return a `Trainer` if there is an optimizer, else a `TorchEngine`."""
        if self.optimizer is None:
            from bmgraph.runtime.torch.engine import TorchEngine
            from bmgraph.runtime.torch.split import Devices

            devices = Devices(self.devices) if self.devices else None
            return cast("Made", TorchEngine(program, report, devices=devices, compiled=self.torch_compile))
        from bmgraph.backends.torch.build_trainer import build_trainer

        return cast("Made", build_trainer(self, self.optimizer, program, report, manager or PassManager()))
