"""Engine: what every compiled model has and can do, whatever library runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch

from bmgraph.ir.cache_spec import CacheLayout
from bmgraph.ir.input_check import check_inputs
from bmgraph.ir.omitted_inputs import with_encoded
from bmgraph.ir.tensor_spec import Range, TensorSpec
from bmgraph.pass_manager.report import Report
from bmgraph.runtime.temporary import delete_with
from bmgraph.utils.locked_folder import LockedFolder


class Engine(ABC):
    """A compiled model: call it with the inputs by name, get the outputs by name.

    `inputs`, `outputs` and `ranges` say what it takes and gives, `ignored` which inputs it takes and does not read, `report`
    what was done, `example` a batch that it runs on, `cache` which inputs and outputs are its KV cache. `encoder` is the engine of the encoder that runs before it, if there
    is one. `temporary` is a folder that is deleted with the engine. Obtain one from `bmgraph.compile(...)` or
    `bmgraph.load(...)`.
    """

    def __init__(
        self,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        ranges: Mapping[str, Range],
        report: Report,
        *,
        example: Mapping[str, torch.Tensor] | None = None,
        ignored: tuple[str, ...] = (),
        cache: CacheLayout | None = None,
        temporary: LockedFolder | None = None,
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.ranges = dict(ranges)
        self.report = report
        self.example = dict(example or {})
        self.ignored = ignored
        self.cache = cache
        if temporary is not None:
            delete_with(self, temporary)

    @abstractmethod
    def __call__(self, **batch: object) -> dict[str, torch.Tensor]:
        """Run the engine; raises InputError for a wrong name, dtype or shape before anything runs."""

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Write the engine as a bundle for `bmgraph.load`; raises BundleError if it cannot be written."""

    @property
    def encoder(self) -> Engine | None:
        """The engine of the encoder that runs before this one; None if there is none."""
        return None

    @property
    def unable(self) -> str:
        """Why the engine cannot run on this machine; empty if it can."""
        return ""

    def checked(self, batch: Mapping[str, object]) -> dict[str, torch.Tensor]:
        """The batch as tensors in the order of `inputs`, with what the encoder gives; raises InputError."""
        return check_inputs(
            self.inputs, self.ranges, with_encoded(self.encoder, self.inputs, batch), self.ignored, self.cache
        )

    def signature(self) -> str:
        """The inputs and the names of the outputs, for people."""
        return f"{', '.join(map(str, self.inputs))} -> {', '.join(spec.name for spec in self.outputs)}"
