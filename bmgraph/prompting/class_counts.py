"""ClassCounts: how often rows of each class were given each class, and accuracy and F1 of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from bmgraph.prompting.measures import Measures
from bmgraph.prompting.rows import LABEL

Tensors = dict[str, torch.Tensor]
FIGURES = ("accuracy", "macro_f1", "micro_f1")


class ClassCounts:
    """What `trainer.evaluate(measure=)` and `trainer.fit(measure=)` measure of a classification; see `Classify.measure`.

    scores: outputs and inputs by name -> scores of classes f[B, C]. The sums are the confusion matrix f[C * C], rows by the
    class that is expected.
    """

    names: tuple[str, ...] = FIGURES

    def __init__(self, scores: Callable[[Tensors, Tensors], torch.Tensor], classes: Sequence[str]) -> None:
        self._scores, self._classes = scores, tuple(classes)

    def __call__(self, outputs: Tensors, inputs: Tensors) -> torch.Tensor:
        """The confusion matrix f[C * C] of rows with labels."""
        found, labels = self._scores(outputs, inputs).argmax(-1), inputs[LABEL]
        numbers = torch.arange(len(self._classes), device=labels.device)
        expected, given = (
            (values[:, None] == numbers).to(torch.float32) for values in (labels, found.to(labels.device))
        )
        return (expected.T @ given).flatten()

    def figures(self, sums: torch.Tensor) -> Mapping[str, float]:
        """accuracy, macro_f1 and micro_f1; see `Measures`."""
        measures = Measures.of_counts(sums.reshape(len(self._classes), -1).tolist(), self._classes)
        return {name: getattr(measures, name) for name in FIGURES}
