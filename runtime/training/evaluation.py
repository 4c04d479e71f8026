"""Evaluates a trainer on batches: the mean loss over all items, by a graph in eval form that reads the trainer's own tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from bmgraph.errors import InputError
from bmgraph.ir.input_check import check_inputs
from bmgraph.runtime.training.batch_sharding import rows_of_rank
from bmgraph.runtime.training.generators import kept_generators
from bmgraph.training.evaluation_graph import trace_evaluation
from bmgraph.training.executor import Runner
from bmgraph.training.row_measure import RowMeasure
from bmgraph.training.step_program import WHOLE, StepProgram
from bmgraph.utils.digest import digest

if TYPE_CHECKING:
    from bmgraph.runtime.training.trainer import Trainer

Rows = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Evaluation:
    """The mean loss over the `count` items of all batches, on all ranks.

    `count`: of the first term, where the loss is a sum of several; each is a mean over its own items of all batches.
    `perplexity`: exp(loss), where the loss is a plain cross-entropy over positions; None where it is another. `measures`: the
    figures of `evaluate(measure=)` by name.
    """

    loss: float
    count: float
    batches: int
    perplexity: float | None = None
    measures: Mapping[str, float] = field(default_factory=dict)


class Evaluator:
    """Evaluates one trainer; holds the graph, and no tensor of its own but constants of the loss."""

    def __init__(self, trainer: Trainer, measure: RowMeasure | None = None) -> None:
        """Trace the graph; raises an error on all ranks if it fails on one."""
        self._trainer, state = trainer, trainer.state
        self.measure = measure
        with state.ranks.fail_together():  # tracing is not collective
            if state.evaluation is None:
                raise InputError(
                    "this trainer's step was not traced from a program: there is nothing to evaluate"
                )
            self._step: StepProgram = trace_evaluation(state, measure)
            self._runner = Runner(self._step)
            self._has_perplexity = state.evaluation.is_token_cross_entropy
            self._counts = state.evaluation.counts
        self._own = {
            name: self._step.tensors[name] for name in self._step.tensors.keys() - state.tensors.keys()
        }

    def run(self, loader: Iterable[Mapping[str, object]]) -> Evaluation:
        """Evaluate all batches; collective."""
        self._refresh()
        state, batches = self._trainer.state, 0
        terms = 1 if self._counts is None else 1 + len(self._counts.shares)
        totals = counts = torch.zeros(terms, dtype=torch.float64)
        sums = torch.zeros((), dtype=torch.float64)
        for rows, weight in self._batches(loader):
            with state.ranks.fail_together():  # the graph takes part in all collectives, even where it fails
                given = {name: value.to(state.device) for name, value in rows.items()}
                (total, items, *measured), _ = self._runner.call(given, {})
                own = items if self._counts is None else self._counts.count(rows, state.tensors)
            if weight:
                totals = totals + weight * total.double().cpu().reshape(-1)
                counts = counts + weight * own.double().cpu().reshape(-1)
            for part in measured:
                sums = sums + (weight * part.double().cpu() if weight else torch.zeros(part.shape))
            batches += 1
        if state.ranks.size > 1:
            totals, counts = state.ranks.sum(torch.stack([totals, counts]).to(state.device)).cpu()
            if self.measure is not None:
                sums = state.ranks.sum(sums.to(state.device)).cpu()
        if not batches:
            raise InputError("the loader gives no batches to evaluate")
        if not bool((counts > 0).all()):
            raise InputError(
                "no item of the batches counts for the loss, or for one of its terms: every label is ignored"
            )
        loss, count = float((totals / counts).sum()), float(counts[0])
        perplexity = None
        if self._has_perplexity:
            perplexity = math.exp(loss) if loss < math.log(1e300) else math.inf
        whole = round(count) if abs(count - round(count)) < 1e-6 else count
        figures = {} if self.measure is None else dict(self.measure.figures(sums))
        return Evaluation(loss, whole, batches, perplexity, figures)

    def _refresh(self) -> None:
        """Read the trainer's tensors of now; buffers, whose statistics ranks may have of their own rows, are rank 0's."""
        state = self._trainer.state
        tensors = {**state.tensors, **self._own}
        if state.ranks.size > 1:
            for name in state.outline.buffers:
                tensors[name] = state.ranks.broadcast(state.tensors[name].clone())
        self._step.tensors.clear()
        self._step.tensors.update(tensors)

    def _batches(self, loader: Iterable[Mapping[str, object]]) -> Iterator[tuple[Rows, float]]:
        """This rank's rows of each batch, and what they count; 0 where another rank has more batches than this one."""
        trainer, state = self._trainer, self._trainer.state
        rows: Rows = state.outline.example
        iterator: Iterator[Mapping[str, object]] | None = None
        while True:
            with state.ranks.fail_together(), kept_generators():
                iterator = iter(loader) if iterator is None else iterator
                batch = next(iterator, None)
                if batch is not None and not isinstance(batch, Mapping):
                    raise InputError(
                        f"the loader gives a {type(batch).__name__}: give dicts of tensors by input name"
                    )
            have = self._sum(float(batch is not None))
            if not have:
                return
            if have < state.ranks.size and (trainer.batch == WHOLE or state.gathered):
                advice = "the same whole batches" if trainer.batch == WHOLE else "equally many (gather=)"
                raise InputError(f"ranks have different numbers of batches: give every rank {advice}")
            weight = 0.0
            if batch is not None:
                rows, weight = self._rows(batch)
            elif trainer.batch != WHOLE:
                rows_of_rank(state, rows, trainer.batch)  # takes part in what ranks compare
            yield rows, weight

    def _rows(self, batch: Mapping[str, object]) -> tuple[Rows, float]:
        """This rank's rows; a batch of fewer rows than ranks is run whole by each of them."""
        state, ranks = self._trainer.state, self._trainer.state.ranks
        if self._trainer.batch == WHOLE and ranks.size > 1 and not state.gathered:
            with ranks.fail_together():
                outline = state.outline
                checked = check_inputs(outline.inputs, outline.ranges, batch, outline.ignored)
            small = state.rows.count(checked) < ranks.size
            if self._sum(float(small)):
                ranks.check_same("batch", {"batch": bytes.fromhex(digest(checked))}, "the same batches")
                return checked, 1 / ranks.size
        return rows_of_rank(state, batch, self._trainer.batch)[1], 1.0

    def _sum(self, value: float) -> float:
        state = self._trainer.state
        if state.ranks.size == 1:
            return value
        return float(state.ranks.sum(torch.tensor(value, dtype=torch.float64, device=state.device)))
