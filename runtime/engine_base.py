"""Engine: what every compiled model has and can do, whatever library runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bmgraph.errors import InputError
from bmgraph.ir.cache_spec import CacheLayout
from bmgraph.ir.input_check import check_inputs
from bmgraph.ir.omitted_inputs import inputs_of, with_fed
from bmgraph.ir.tensor_spec import Range, TensorSpec
from bmgraph.pass_manager.report import Report
from bmgraph.runtime.temporary import delete_with
from bmgraph.utils.locked_folder import LockedFolder

if TYPE_CHECKING:
    from bmgraph.prompting.measures import Measures
    from bmgraph.prompting.rows import Row
    from bmgraph.prompting.task import Task
    from bmgraph.runtime.delta_slots import Hold
    from bmgraph.runtime.live_deltas import LiveDeltas

ROWS = 32
"""Rows that a task runs at once if nobody says."""


class Engine(ABC):
    """A compiled model: call it with the inputs by name, get the outputs by name.

    `inputs`, `outputs` and `ranges` say what it takes and gives, `ignored` which inputs it takes and does not read, `report`
    what was done, `example` a batch that it runs on, `cache` which inputs and outputs are its KV cache. `graphs` are the
    engines of the program's other graphs, by name; those that give inputs of this one run before it. `deltas` are those among
    which rows choose. `temporary` is a folder that is deleted with the engine. `task` is what it was compiled for, with resources={"task": ...}. Obtain one from
    `bmgraph.compile(...)` or `bmgraph.load(...)`.
    """

    task: Task | None = None
    live: LiveDeltas | None = None
    """What `deltas` gives; None where rows choose among none."""

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
        graphs: Mapping[str, Engine] | None = None,
        temporary: LockedFolder | None = None,
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.ranges = dict(ranges)
        self.report = report
        self.example = dict(example or {})
        self.ignored = ignored
        self.cache = cache
        self.graphs = dict(graphs or {})
        if temporary is not None:
            delete_with(self, temporary)

    @abstractmethod
    def __call__(self, **batch: object) -> dict[str, torch.Tensor]:
        """Run the engine; raises InputError for a wrong name, dtype or shape before anything runs."""

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Write the engine as a bundle for `bmgraph.load`; raises BundleError if it cannot be written."""

    @property
    def deltas(self) -> LiveDeltas:
        """The deltas among which rows choose: `add`, `remove` and `swap` work while the engine runs.

        Raises InputError for an engine of a program without the pass `Deltas`, or one that has its deltas built in.
        """
        if self.live is None:
            raise InputError(
                "this engine has no deltas that can be exchanged: compile with Deltas(names, capacity=...), for the backend onnx or "
                "torch"
            )
        return self.live

    def rename_choice(self, name: str, names: tuple[str, ...]) -> None:
        """Let an input have other names for its values 1, 2, ..., as `live` says them."""
        self.inputs = renamed(self.inputs, name, names)

    def hold_deltas(self, given: object, rows: Mapping[str, int]) -> Hold | None:
        """Hold the deltas that a call chooses, whose numbers are then those of the hold; None where rows choose none.

        `rows` are the sizes that are known. Raises InputError for an unknown name.
        """
        if self.live is None:
            return None
        spec = next(spec for spec in self.inputs if spec.name == self.live.form.input)
        if isinstance(spec.shape[0], str) and spec.shape[0] not in rows and not hasattr(given, "shape"):
            return None  # the check of all inputs tells what is missing
        return self.live.hold(given, spec, rows)

    @contextmanager
    def holding_deltas(self, batch: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
        """The batch with numbers of the deltas that its rows choose, which stay what they are until the end."""
        if self.live is None:
            yield batch
            return
        name = self.live.form.input
        sizes = {
            dim: int(size)
            for spec in (*inputs_of(self.feeders()), *self.inputs)
            for dim, size in zip(spec.shape, getattr(batch.get(spec.name), "shape", ()))
            if isinstance(dim, str)
        }
        hold = self.hold_deltas(batch.get(name), sizes)
        if hold is None:
            yield batch
            return
        with hold:
            given = hasattr(batch.get(name), "shape")
            yield batch if given else {**batch, name: torch.tensor(hold.numbers, dtype=torch.int64)}

    def feeders(self) -> list[Engine]:
        """The engines of other graphs whose outputs are inputs of this one, by name."""
        wanted = {spec.name for spec in self.inputs}
        return [
            other
            for other in self.graphs.values()
            if not wanted.isdisjoint(spec.name for spec in other.outputs)
        ]

    def classify(self, rows: Sequence[Row], batch_size: int = ROWS) -> list[str]:
        """The class of each row, a text or a dict of fields, by the engine's task (`bmgraph.prompting.Classify`).

        Texts that are longer than the engine takes are truncated as the task says. Raises InputError if the engine has no such
        task, for a row without a field that the template reads, and as `__call__` does.
        """
        from bmgraph.runtime.classification import class_scores, classifier

        classes = classifier(self).classes
        return [classes[index] for index in class_scores(self, rows, batch_size).argmax(-1).tolist()]

    def class_probabilities(self, rows: Sequence[Row], batch_size: int = ROWS) -> torch.Tensor:
        """The probabilities f[N, C] of the task's classes for each row; raises what `classify` does."""
        from bmgraph.runtime.classification import class_scores

        return class_scores(self, rows, batch_size).softmax(-1)

    def measure(self, rows: Sequence[Row], batch_size: int = ROWS) -> Measures:
        """Accuracy and F1 of `classify` on rows with a `label`, by name or number; raises what `classify` does, and InputError for
        a row without one."""
        from bmgraph.runtime.classification import measured

        return measured(self, rows, batch_size)

    def at_masks(self, rows: Sequence[Row], batch_size: int = ROWS) -> torch.Tensor:
        """What the model says at the masks of the task's template, f[N, M, V]: logits, of which `Verbalizer.searched` and
        `without_rare` make words, or the hidden states of `PrototypicalVerbalizer.fit`; raises what `classify` does."""
        from bmgraph.runtime.classification import all_at_masks

        return all_at_masks(self, rows, batch_size)

    def calibrate(self, rows: Sequence[Row] = ("",)) -> None:
        """Divide the probabilities of the task's words by those for rows without content, such as an empty text or `N/A`.

        Source: Zhao et al. 2021 (arXiv:2102.09690). Raises InputError for a verbalizer other than `Verbalizer`, and as `classify`.
        """
        from bmgraph.runtime.classification import calibrated

        self.task = calibrated(self, rows, ROWS)

    @property
    def precision(self) -> torch.dtype:
        """What the engine computes the program's float32 in."""
        return torch.float32

    @property
    def rounds_cache(self) -> bool:
        """Whether it keeps its KV cache in codes of 8 bits, with a scale and a zero point for each position and head."""
        return False

    @property
    def unable(self) -> str:
        """Why the engine cannot run on this machine; empty if it can."""
        return ""

    def checked(self, batch: Mapping[str, object]) -> dict[str, torch.Tensor]:
        """The batch as tensors in the order of `inputs`, with what other graphs give; raises InputError."""
        return check_inputs(
            self.inputs, self.ranges, with_fed(self.feeders(), self.inputs, batch), self.ignored, self.cache
        )

    def has_room_for(self, batch: Mapping[str, object]) -> bool:
        """Whether a batch that fits the inputs fits into the memory that the engine may take."""
        return True

    def signature(self) -> str:
        """The inputs and the names of the outputs, for people."""
        return f"{', '.join(map(str, self.inputs))} -> {', '.join(spec.name for spec in self.outputs)}"


def renamed(specs: Sequence[TensorSpec], name: str, names: tuple[str, ...]) -> tuple[TensorSpec, ...]:
    """Specs, of which that of an input has other names for its values."""
    return tuple(replace(spec, names=names) if spec.name == name else spec for spec in specs)
