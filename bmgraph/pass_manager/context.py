"""What a pass may ask of the world around it: resources, calibration, other passes, and a place for its report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from bmgraph.analysis.interpreter import Observed
from bmgraph.errors import InputError, ResourceError
from bmgraph.ir.categorical_input import every_name
from bmgraph.ir.pass_record import Edit
from bmgraph.pass_manager.target import TORCH, Target
from bmgraph.utils.digest import Consumed, digest
from bmgraph.utils.progress import track

if TYPE_CHECKING:
    from bmgraph.ir.program import Program
    from bmgraph.pass_manager.pass_base import Pass
    from bmgraph.pass_manager.train_in_pass import Trained

CALIBRATION, TRAINER = "calibration", "trainer"


@dataclass
class Context:
    """Given to `Pass.run`; it collects what the pass did.

    `nested` runs another pass with all its checks, as part of this one.
    """

    resources: Mapping[str, Any] = field(default_factory=dict)
    target: Target = TORCH
    nested: Callable[[Pass, Program], Program] | None = None
    edits: list[Edit] = field(default_factory=list)
    declines: list[Edit] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)

    def edited(self, site: str, what: str) -> None:
        """Report a site that was changed."""
        self.edits.append(Edit(site, what))

    def declined(self, site: str, why: str) -> None:
        """Report a site that was left as it was, and the reason."""
        self.declines.append(Edit(site, why))

    def has(self, name: str) -> bool:
        """Whether a resource of that name was given."""
        return self.resources.get(name) is not None

    def resource(self, name: str) -> Any:
        """A named resource; raises ResourceError where it was not given."""
        if not self.has(name):
            argument = "calibration=batches" if name == CALIBRATION else f"resources={{{name!r}: ...}}"
            raise ResourceError(f"a pass needs the resource {name!r}, which was not given: pass {argument}")
        value = self.resources[name]
        if name != CALIBRATION:
            self.digests[name] = digest(value)
        return value

    def batches(
        self, name: str = CALIBRATION, limit: int | None = None
    ) -> Iterable[Mapping[str, torch.Tensor]]:
        """The batches of a resource, at most `limit`, with their digest kept once they are consumed."""
        source = self.resource(name)
        if isinstance(source, Mapping):
            source = [source]
        if not isinstance(source, Iterable) or iter(source) is source:
            raise ResourceError(f"resource {name!r} can be read only once: give a list of batches")
        consumed = Consumed(source)
        for count, batch in enumerate(consumed):
            if limit is not None and count == limit:
                break
            if not isinstance(batch, Mapping):
                raise ResourceError(
                    f"batch {count} of {name!r} is a {type(batch).__name__}: give dicts of tensors by input name"
                )
            yield batch
        if consumed.count == 0:
            raise ResourceError(f"resource {name!r} holds no batch")
        self.digests[name] = consumed.digest

    def calibrate(
        self,
        program: Program,
        names: set[str],
        visit: Callable[[str, torch.Tensor], None],
        limit: int | None = None,
    ) -> int:
        """Run the program on the calibration batches and show `visit` the values of the nodes named.

        Memory is bounded by one batch. Returns the number of batches; raises ResourceError where a batch does
        not fit the program.
        """
        observed = Observed(program)
        count = 0
        for batch in track(self.batches(limit=limit), "calibrating"):
            try:
                observed.run(every_name(program.inputs, batch, start=count), names, visit)
            except InputError as error:
                raise ResourceError(f"calibration batch {count} does not fit the program: {error}") from error
            count += 1
        return count

    def cycle(self, name: str, count: int) -> Iterator[Mapping[str, torch.Tensor]]:
        """`count` batches of a resource, from its beginning again where it holds fewer; their digest is that of those
        that were taken at first."""
        taken, first = 0, ""
        while taken < count:
            for batch in self.batches(name, limit=count - taken):
                yield batch
                taken += 1
            first = first or self.digests[name]
        self.digests[name] = first

    def train(self, program: Program, batches: Iterable[Mapping[str, torch.Tensor]], steps: int) -> Trained:
        """Train a program on its output `loss`, a step for each batch, and give it back with what was trained.

        How is said by the resource "trainer", a configuration such as `Torch(optimizer=AdamW(lr=1e-3))`; without one
        AdamW trains at its default rate. What is trained is all that is not frozen.
        """
        from bmgraph.pass_manager.train_in_pass import train

        if self.has(TRAINER):
            return train(program, batches, steps, self.resource(TRAINER))
        from bmgraph.compiler import default_trainer

        return train(program, batches, steps, default_trainer())

    def run(self, item: Pass, program: Program) -> Program:
        """Run another pass as part of this one, with its own verification and record."""
        assert self.nested is not None, "a pass outside of a pipeline cannot run another"
        return self.nested(item, program)
