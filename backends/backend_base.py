"""Backend: what every configuration of a target says and can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Generic, Self, TypeVar

from bmgraph.errors import BackendError, BundleError, InputError
from bmgraph.ir.cache_spec import FLOAT, INT8
from bmgraph.ir.program import Program
from bmgraph.pass_manager.pass_base import ModelPass, Stage, StepPass
from bmgraph.pass_manager.pass_manager import PassManager
from bmgraph.pass_manager.report import Report
from bmgraph.pass_manager.target import TORCH, Target
from bmgraph.training.loss_terms import Loss

if TYPE_CHECKING:
    from bmgraph.runtime.engine_base import Engine
    from bmgraph.runtime.training.trainer import Trainer
    from bmgraph.serialize.bundle import Bundle

Made = TypeVar("Made", bound="Engine | Trainer", covariant=True)
"""What a backend builds."""


@dataclass(frozen=True)
class Backend(ABC, Generic[Made]):
    """A target of `compile`, and its options; subclasses are frozen dataclasses, whose fields are the options.

    A subclass gives a `name` and `build`; the properties below are what a backend has unless it says otherwise, by a field, a
    class variable or a property of its own.
    """

    name: ClassVar[str]
    stages: ClassVar[tuple[Stage, ...]] = ("model",)
    """The stages of the passes that it takes."""
    target: ClassVar[Target] = TORCH
    """What it can run, which passes read."""
    every_rank_lowers: ClassVar[bool] = False
    """Whether each rank builds its own; else rank 0 builds and saves, and the others load that."""

    on_host: ClassVar[bool] = True
    """Whether it builds of weights in the host's memory; else of those where the program has them."""

    streams: ClassVar[bool] = False
    """Whether its engines keep within `Program.memory`."""

    kv_caches: ClassVar[tuple[str, ...]] = (FLOAT,)
    """What its engines can keep a KV cache in."""
    why_float: ClassVar[str] = "its engines have no other"
    """Why its engines keep no other KV cache than one of floats."""

    kv_cache: str = field(default=FLOAT, kw_only=True)
    """What engines keep a KV cache in: FLOAT, what they compute in, or INT8, codes of 8 bits."""

    @property
    def trains(self) -> bool:
        """Whether it builds a trainer: a captured program's backward is then compared with the model's."""
        return False

    @property
    def waits(self) -> float:
        """Seconds that the ranks of what it builds wait for each other; 0 where only rank 0 works."""
        return 0.0

    @property
    def loss(self) -> str | Loss:
        """What a trainer minimises: the name of an output, or a function of outputs and inputs."""
        return "loss"

    @property
    def generate(self) -> bool:
        """Whether its engines are to generate: an example of ids alone then gets a mask."""
        return False

    def check_kv_cache(self) -> None:
        """Raise InputError where its engines cannot keep their KV cache in what `kv_cache` says."""
        if self.kv_cache not in (FLOAT, INT8):
            raise InputError(f"kv_cache={self.kv_cache!r}: choose {FLOAT!r} or {INT8!r}")
        if self.kv_cache not in self.kv_caches:
            raise InputError(
                f"kv_cache={self.kv_cache!r} on backend {self.name!r}: {self.why_float}; leave it out, or take "
                f"OpenVINO(generate=True, kv_cache={self.kv_cache!r})"
            )

    @property
    def chooses(self) -> bool:
        """Whether `choose` makes what it builds, of several backends."""
        return False

    def choose(self, lower: Callable[[Backend[Engine]], Engine]) -> Made:
        """Where it `chooses`: the best of what `lower` makes of other backends, each for its own target."""
        raise BackendError(f"backend {self.name!r} says that it chooses, and has no choose()")

    @property
    def passes(self) -> tuple[StepPass, ...]:
        """Passes of the step stage, after the user's."""
        return ()

    @property
    def appended(self) -> tuple[ModelPass, ...]:
        """Passes of the model stage that run after the user's."""
        return ()

    def prepended(self, program: Program) -> tuple[ModelPass, ...]:
        """Passes of the model stage that run before the user's on this program."""
        return ()

    def with_passes(self, passes: tuple[StepPass, ...]) -> Self:
        """The same configuration with these passes in front of its own; raises InputError without a step stage."""
        raise InputError(f"backend {self.name!r} has no step stage: leave out {', '.join(map(str, passes))}")

    def generating(self) -> Self:
        """The same configuration, for engines that generate; raises InputError where its engines do not."""
        raise InputError(f"engines of backend {self.name!r} do not generate: leave that out, or take onnx")

    @classmethod
    def load(cls, bundle: Bundle) -> Engine:
        """The engine that one of this backend saved: a checked bundle of the kind "engine" whose manifest names the backend.

        Of a backend of another package, for `bmgraph.load`, which calls it in trust of that package alone. Raises BundleError.
        """
        raise BundleError(
            f"{bundle.path} holds an engine of backend {cls.name!r}, which has no `load`: build it again by bmgraph.compile"
        )

    @abstractmethod
    def build(self, program: Program, report: Report, manager: PassManager | None = None) -> Made:
        """The engine or trainer of a program; times, sizes and notes go into `report`. Raises BackendError.

        `manager` runs passes of later stages with the settings of this compilation.
        """
