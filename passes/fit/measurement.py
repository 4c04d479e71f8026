"""How large, how fast and how far from the first program a candidate is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from bmgraph.analysis.cost_model import cost_of
from bmgraph.errors import PassError, ResourceError
from bmgraph.ir.categorical_input import fill_categorical
from bmgraph.ir.program import Program
from bmgraph.lowering.to_exported_program import deployed
from bmgraph.pass_manager.context import CALIBRATION, Context
from bmgraph.pass_manager.engine_trials import TrialEngine
from bmgraph.passes.fit.plan import AS_IT_IS, Candidate
from bmgraph.utils.finite import not_finite_values
from bmgraph.verify.metrics import drift
from bmgraph.verify.padding import padded_outputs, padding_mask
from bmgraph.verify.reference_outputs import Batch, fitted

BATCHES = 4
"""Calibration batches on which drift is measured, at most."""

HELD = 2**28
"""Bytes of outputs of the first program that are held, of one batch at least."""


class Measurement:
    """Measures programs against a first one: on calibration batches that have all inputs, else on the example."""

    def __init__(self, program: Program, context: Context, timed: bool) -> None:
        self._context, self._program = context, program
        self._first = deployed(program)
        if self._first.device.type == "meta":
            raise PassError(
                "it measures, and a program on the meta device has no values: give it weights first"
            )
        self._expected: list[tuple[Batch, dict[str, torch.Tensor]]] = []
        held = 0
        for number, batch in enumerate(self._batches()):
            outputs = self._first(**fitted(batch, self._first.inputs))
            wrong = next((name for name, value in outputs.items() if bool(value.isnan().any())), None)
            if wrong is not None:
                source = f"calibration batch {number}" if self._calibrated else "the example"
                suspects = not_finite_values(batch)
                because = f" (inputs that are not finite: {suspects})" if suspects else ""
                raise ResourceError(
                    f"{source} makes the output {wrong!r} NaN{because}: repair it or the model, or leave the batch out"
                )
            self._expected.append((batch, outputs))
            held += sum(value.nbytes for value in outputs.values())
            if held > HELD:
                break
        self._engine: TrialEngine | None = None
        if timed:
            if context.lowered is None:
                raise PassError(
                    "latency= is measured on an engine: give the pass to bg.compile or bg.plan with a backend that builds one, in one "
                    "process"
                )
            self._engine = context.lowered(program)
            if self._engine.unable:
                raise PassError(f"latency= cannot be measured here: {self._engine.unable}")

    @property
    def compared(self) -> str:
        """On what drift is measured, in words."""
        count, source = len(self._expected), "calibration batches" if self._calibrated else "example"
        sizes = "x".join(map(str, next(iter(self._expected[0][0].values())).shape))
        return f"{count} {source}, the first of {sizes}" if self._calibrated else f"the example of {sizes}"

    def of(self, program: Program, passes: Sequence[str]) -> Candidate:
        """A program after passes: the bytes of what is stored of it, and, where a latency is asked for, its engine's files and time.

        Raises PassError where outputs are others than those of the first program, BackendError where no engine can be built.
        """
        served = deployed(program) if passes else self._first
        error, cosine = self._drift(served) if passes else (0.0, 1.0)
        tensors = {**served.parameters, **served.buffers}
        flops = cost_of((), served.graphs.values(), served).flops
        found = Candidate(tuple(passes), sum(item.nbytes for item in tensors.values()), flops, error, cosine)
        if self._engine is None:
            return found
        assert self._context.lowered is not None
        assert self._context.timed is not None
        built = self._context.lowered(program) if passes else self._engine
        times = self._context.timed({AS_IT_IS: self._engine} | ({"after": built} if passes else {}))
        return replace(_with_files(found, built), milliseconds=list(times.values())[-1])

    def weighed(self, found: Candidate, program: Program) -> Candidate:
        """The candidate with the bytes of its engine's files, where there is a backend. Raises BackendError."""
        if found.files is not None or self._context.lowered is None:
            return found
        return _with_files(found, self._context.lowered(program))

    def _batches(self) -> list[Batch]:
        """What drift is measured on."""
        self._calibrated = False
        if self._context.has(CALIBRATION):
            with self._context.searching():
                given: list[Batch] = [
                    fill_categorical(self._first.inputs, batch, start=number)
                    for number, batch in enumerate(self._context.batches(limit=BATCHES))
                ]
            names = {spec.name for spec in self._first.inputs}
            found = [batch for batch in given if names <= batch.keys()]
            if found:
                self._calibrated = True
                return found
        if not self._program.example:
            raise PassError("it measures outputs: give calibration batches, or a program with an example")
        return [self._program.example]

    def _drift(self, served: Program) -> tuple[float, float]:
        """The relative error of outputs, as the root of its mean square over batches, and their mean cosine."""
        names = [spec.name for spec in self._first.outputs]
        if names != [spec.name for spec in served.outputs]:
            raise PassError(f"the outputs are no longer {', '.join(names)}")
        errors, cosines = [], []
        for batch, expected in self._expected:
            found = served(**fitted(batch, served.inputs))
            mask = padding_mask(self._first, _of(self._first, batch))
            moved = drift(found, expected, batch[mask] if mask else None, padded_outputs(self._first, mask))
            errors.append(moved.error)
            cosines.append(moved.cosine)
        error = math.sqrt(sum(item**2 for item in errors) / len(errors))
        if not math.isfinite(error):
            raise PassError("the outputs are not finite, or of other shapes")
        return error, sum(cosines) / len(cosines)


def _with_files(found: Candidate, built: TrialEngine) -> Candidate:
    return found if built.bytes is None else replace(found, files=built.bytes)


def _of(program: Program, batch: Mapping[str, torch.Tensor]) -> Batch:
    return fitted(batch, program.inputs)
