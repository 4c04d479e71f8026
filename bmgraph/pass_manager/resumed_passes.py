"""Passes on a program that go on where an earlier run of the same passes was stopped."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from bmgraph.errors import BmgraphError, InputError
from bmgraph.ir.pass_record import machine
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import CALIBRATION, Context
from bmgraph.pass_manager.kept_program import packed_program, program_identity, unpacked_program
from bmgraph.pass_manager.model_rules import ModelRules
from bmgraph.pass_manager.pass_base import Pass
from bmgraph.pass_manager.pass_spec import recorded_text
from bmgraph.pass_manager.resume_folder import ResumeFolder, Work
from bmgraph.utils.digest import digest
from bmgraph.utils.versions import versions
from bmgraph.verify.reference_outputs import comparison_batch

if TYPE_CHECKING:
    from bmgraph.pass_manager.pass_manager import PassManager


class ResumedPasses:
    """Keeps in a folder the program after the last pass that finished, and takes it up in the next run of the same passes.

    `settings` and `rules` are those that the passes run with.
    """

    def __init__(self, folder: ResumeFolder, settings: PassManager) -> None:
        self._folder, self._tell = folder, settings.tell
        self._told: list[str] = []
        self.settings = replace(settings, tell=self._note)
        self.rules = ModelRules(self.settings)

    def begin(self, items: Sequence[Pass], first: Program) -> tuple[int, Program]:
        """How many passes have finished, and the program after them.

        Raises InputError where the folder is of other work, or a resource holds other data than they read.
        """
        self._first = first
        self._folder.begin(self._identity(items, first))
        kept = self._folder.last_pass()
        if kept is None:
            return 0, first
        number, value = kept
        work = Work(self._folder, number, ())
        context = Context(dict(self.settings.resources), self.settings.target, work=work)
        try:
            work.check_reads(value["reads"], context)
            program = unpacked_program(first, value["program"])
            self.rules.restore(first, program, value["reference"])
        except InputError:
            raise
        except (BmgraphError, KeyError, TypeError, ValueError, RuntimeError) as error:
            warnings.warn(
                f"the program that is kept in {self._folder.path} is computed again: {error}", stacklevel=2
            )
            return 0, first
        self._folder.forget_before(number)
        self._folder.passes = number + 1
        for line in value["told"]:
            self._note(line)
        return number + 1, program

    def work(self, number: int, item: Pass) -> Work:
        """Where a pass keeps what it finds."""
        return Work(self._folder, number, (recorded_text(item),))

    def finished(self, number: int, program: Program, rules: ModelRules) -> None:
        """Keep what a pass has made. Raises ResourceError where it cannot be written."""
        try:
            packed = packed_program(self._first, program)
        except BmgraphError as error:
            warnings.warn(
                f"the program after pass {number + 1} is not kept in {self._folder.path}: {error}",
                stacklevel=2,
            )
            return
        value = {
            "program": packed,
            "reference": rules.packed(),
            "reads": dict(self._folder.reads[0]),
            "told": list(self._told),
        }
        self._folder.finish_pass(number, value)

    def _note(self, line: str) -> None:
        self._told.append(line)
        if self._tell is not None:
            self._tell(line)

    def _identity(self, items: Sequence[Pass], first: Program) -> dict[str, str]:
        """All that what passes find follows from, but for what they read of resources."""
        settings = self.settings
        batch = comparison_batch(first, settings.resources.get(CALIBRATION))
        return {
            "bmgraph": versions()["bmgraph"],
            **machine(),
            "passes": ",".join(map(recorded_text, items)),
            "target": settings.target.text,
            "verify": settings.verify,
            "max_drift": str(settings.max_drift),
            "trains": str(settings.trains),
            "resources": ", ".join(
                sorted(name for name, value in settings.resources.items() if value is not None)
            ),
            **program_identity(first),
            "first calibration batch": digest(dict(batch)),
        }
