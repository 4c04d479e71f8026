"""`engine.classify`: rows of data through a task's template, the engine and the verbalizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from bmgraph.errors import InputError
from bmgraph.ir.tensor_spec import Range
from bmgraph.prompting.classify import POSITIONS, Classify, at
from bmgraph.prompting.measures import Measures
from bmgraph.prompting.prompts import IDS, SEGMENTS
from bmgraph.prompting.rows import LABEL, Row, label_of, rows_of, some_rows, without_label
from bmgraph.prompting.verbalizer import Verbalizer

if TYPE_CHECKING:
    from bmgraph.prompting.task import Task
    from bmgraph.runtime.engine_base import Engine


def class_scores(engine: Engine, rows: Sequence[Row], batch_size: int) -> torch.Tensor:
    """Scores of classes f[N, C] for rows, `batch_size` at once; raises InputError if the engine has no such task."""
    task = classifier(engine)
    if not rows_of(rows):
        return torch.zeros(0, len(task.classes))
    return torch.cat(
        [task.verbalizer.scores(values).float().cpu() for values in _parts(engine, rows, batch_size)]
    )


def measured(engine: Engine, rows: Sequence[Row], batch_size: int) -> Measures:
    """Accuracy and F1 of the engine's classes for rows that have labels; raises InputError as `class_scores`, and for a row
    without one."""
    scores = classifier(engine).verbalizer
    given = [scores.class_index(label_of(row, index), index) for index, row in enumerate(some_rows(rows))]
    found = class_scores(engine, rows, batch_size).argmax(-1).tolist()
    return Measures.of([scores.classes[one] for one in found], [scores.classes[one] for one in given])


def all_at_masks(engine: Engine, rows: Sequence[Row], batch_size: int) -> torch.Tensor:
    """What the engine gives at the masks, f[N, M, V], for one row or more; raises InputError as `class_scores`."""
    return torch.cat([values.float().cpu() for values in _parts(engine, rows, batch_size)])


def calibrated(engine: Engine, rows: Sequence[Row], batch_size: int) -> Classify:
    """The engine's task with a verbalizer that is calibrated on rows; raises InputError for other verbalizers."""
    task = classifier(engine)
    if not isinstance(task.verbalizer, Verbalizer):
        raise InputError(f"a {type(task.verbalizer).__name__} is not calibrated: words of a Verbalizer are")
    return task.with_verbalizer(task.verbalizer.calibrated(all_at_masks(engine, rows, batch_size)[:, 0]))


def _parts(engine: Engine, rows: Sequence[Row], batch_size: int) -> Iterator[torch.Tensor]:
    """What the engine gives at the masks of rows, f[B, M, V], `batch_size` rows at once."""
    task, given = classifier(engine), some_rows(rows)
    if type(batch_size) is not int or batch_size < 1:
        raise InputError(f"batch_size={batch_size!r}: give a number of rows, 1 or more")
    check_soft_tokens(engine, task)
    longest = longest_prompt(engine, task)
    for first in range(0, len(given), batch_size):
        part = [without_label(row) for row in given[first : first + batch_size]]
        yield _at_masks(engine, task, part, longest)


def _at_masks(engine: Engine, task: Classify, rows: Sequence[Row], longest: int | None) -> torch.Tensor:
    """What the engine gives at the masks of rows that run at once, f[B, M, V]; an engine that takes positions to score is asked
    for no others."""
    given, positions = task.batch_and_positions(rows, longest)
    batch: dict[str, Any] = dict(given)
    known = {spec.name for spec in engine.inputs}
    scored = engine.cache.scored if engine.cache is not None else None
    extra = {POSITIONS: positions, LABEL: torch.zeros(len(rows), dtype=torch.int64)}
    batch |= {name: value for name, value in extra.items() if name in known}
    segments, ids = task.names.get(SEGMENTS, SEGMENTS), task.names.get(IDS, IDS)
    if segments in known and segments not in batch:
        assert segments is not None
        assert ids is not None
        batch[segments] = torch.zeros_like(batch[ids])
    if scored is not None and scored in known:
        batch[scored], positions = torch.unique(positions, return_inverse=True)
    values = task.read(engine(**batch))
    return at(values, positions.to(values.device))


def check_soft_tokens(engine: Engine, task: Task) -> None:
    """Raise InputError where a template has soft tokens that the engine does not have."""
    name = task.names.get(IDS, IDS)
    spec = next((spec for spec in engine.inputs if spec.name == name), None)
    known = 0 if spec is None or spec.values is None else max(0, -spec.values[0])
    if task.template.soft_tokens > known:
        raise InputError(
            f"the template has {task.template.soft_tokens} soft tokens, and the engine {known or 'none'}: compile with the pass "
            "SoftTokens(task.template.soft_words), trained with this template"
        )


def longest_prompt(engine: Engine, task: Task) -> int | None:
    """The tokens that the engine takes at most, None if any number."""
    name = task.names.get(IDS, IDS)
    spec = next((spec for spec in engine.inputs if spec.name == name), None)
    if spec is None:
        raise InputError(
            f"the engine has no input {name!r} (it has {', '.join(item.name for item in engine.inputs)}): give the task names="
        )
    length = spec.shape[1]
    return length if isinstance(length, int) else engine.ranges.get(length, Range()).high


def classifier(engine: Engine) -> Classify:
    """The engine's task; raises InputError if it has none that classifies."""
    if not isinstance(engine.task, Classify):
        has = "no task" if engine.task is None else f"a task that does not classify ({engine.task.kind})"
        raise InputError(
            f"this engine has {has}: compile with resources={{'task': Classify(template, verbalizer)}}"
        )
    return engine.task
