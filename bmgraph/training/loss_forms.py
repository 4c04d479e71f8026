"""The forms of a program from which the loss of a step is traced."""

from __future__ import annotations

from dataclasses import dataclass

from bmgraph.ir.program import Program
from bmgraph.training.computation import forward_text
from bmgraph.training.loss_terms import Loss, loss_alone, split_loss
from bmgraph.training.weighted_terms import WeightedTerms, weighted_terms


@dataclass(frozen=True)
class LossForms:
    """`split` returns (sum, count), or, for a loss function, the outputs that this reads; `computation` is its text.

    `terms`: of a loss that is a sum of several, where ranks or micro-batches share it. `means`: the same, for an evaluation,
    whose batches have items of their own also where one rank takes a loss as it is.
    """

    split: Program
    computation: str
    terms: WeightedTerms | None
    means: WeightedTerms | None


def loss_forms(program: Program, loss: str | Loss, shared: bool, several: bool) -> LossForms:
    """The forms for a loss, an output's name or a function. `shared`: whether ranks or micro-batches share a batch;
    `several`: whether there are several of them.

    Raises InputError if `loss` is not a mean that they can share.
    """
    if not isinstance(loss, str):
        return LossForms(program.clone(), forward_text(program), None, None)
    terms = weighted_terms(program, loss, shared) if several else None
    split = split_loss(program, loss, shared, several) if terms is None else terms.program
    means = terms if several else weighted_terms(program, loss, True)
    return LossForms(split, forward_text(loss_alone(program, loss)), terms, means)
