"""Pipeline: passes in order, run on a program without lowering it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING

from bmgraph.backends.train_in_pass import train_in_pass
from bmgraph.distributed.process_group import Ranks
from bmgraph.errors import InputError, ResourceError
from bmgraph.pass_manager.calibration_texts import are_texts, windows_of
from bmgraph.pass_manager.context import CALIBRATION
from bmgraph.pass_manager.pass_manager import PassManager
from bmgraph.pass_manager.resume_folder import resuming
from bmgraph.pass_manager.run_settings import Verify
from bmgraph.pass_manager.target import TORCH, Target
from bmgraph.runtime.generation.tokenizer import Tokenizer, tokenizer_of

if TYPE_CHECKING:
    from bmgraph.ir.program import Program
    from bmgraph.pass_manager.calibration_texts import Calibration
    from bmgraph.pass_manager.observers import Observer
    from bmgraph.pass_manager.pass_base import Pass
    from bmgraph.verify.reference_outputs import Batch


class Pipeline:
    """Passes in the order that they run in.

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.passes import Quantize
        >>> program = bg.capture(torch.nn.Linear(64, 64), (torch.randn(4, 64),))
        >>> small = bg.Pipeline([Quantize("int8", activations="none")]).run(program)
        >>> small.history[-1].text
        'quantize@4{activations=none}'
    """

    def __init__(self, passes: Sequence[Pass], observers: Sequence[Observer] = ()) -> None:
        self.passes = tuple(passes)
        self.observers = tuple(observers)

    def run(
        self,
        program: Program,
        *,
        calibration: Calibration | None = None,
        resources: Mapping[str, object] | None = None,
        max_drift: float | None = None,
        verify: Verify = "numeric",
        target: Target | None = None,
        trains: bool = False,
        resume: str | PathLike[str] | None = None,
    ) -> Program:
        """The program after all passes; the given one is left as it was.

        `calibration` is short for `resources["calibration"]`: batches, or texts with `resources["tokenizer"]`, as in `compile`.
        `max_drift` bounds the drift of every approximate
        pass and of all together (relative L2), in place of each pass's own bound. `target` says what a backend can run;
        torch by default. With `trains`, gradients are compared after every exact pass, too. `verify` and `resume` are as in `compile`.

        Raises OrderError before anything runs where the contracts forbid the order, VerificationError or DriftError
        naming the pass that broke its contract, PassError and ResourceError where a pass cannot run, InputError where the
        model's weights were changed after the program was captured.
        """
        given = (resources or {}).get("tokenizer")
        batches = batches_of(calibration, program, None if given is None else tokenizer_of(given))
        manager = manager_of(
            self.observers, batches, resources, max_drift, verify, target or TORCH, trains=trains
        )
        if resume is not None:
            check_alone(resume, Ranks.here())
        with resuming(resume) as folder:
            return manager.run(self.passes, program, folder)


def check_alone(resume: object, ranks: Ranks) -> None:
    """Raise InputError where one of several ranks is to go on where it was stopped: others would wait for what it no longer does."""
    if resume is not None and ranks.size > 1:
        raise InputError(
            f"resume= is for one process, and these are {ranks.size} ranks: compress in a process of its own, save the program, and "
            "train that"
        )


def batches_of(
    calibration: Calibration | None, program: Program, tokenizer: Tokenizer | None
) -> Iterable[Batch] | None:
    """Calibration batches, made of texts by a tokenizer where these are given. Raises ResourceError without one."""
    if not are_texts(calibration):
        return calibration  # type: ignore[return-value]  # a TypeGuard does not narrow what it denies
    if tokenizer is None:
        raise ResourceError(
            "calibration texts need a tokenizer: pass resources={'tokenizer': tokenizer}, or give calibration batches"
        )
    return windows_of(calibration, tokenizer.encode, program)


def manager_of(
    observers: Sequence[Observer],
    calibration: Iterable[Batch] | None,
    resources: Mapping[str, object] | None,
    max_drift: float | None,
    verify: Verify,
    target: Target,
    trains: bool,
) -> PassManager:
    """The pass manager with what a user gave; `calibration` is short for `resources["calibration"]`."""
    given: dict[str, object] = dict(resources or {})
    if calibration is not None:
        given[CALIBRATION] = calibration
    return PassManager(given, max_drift, verify, target, observers, trainer=train_in_pass, trains=trains)
