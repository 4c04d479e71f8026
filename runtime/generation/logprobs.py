"""Log probabilities of chosen ids, and of the likeliest ones beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bmgraph.errors import InputError
from bmgraph.runtime.generation.option_checks import shown, whole_number

MOST = 64
"""How many of the likeliest ids can be had with each chosen one."""


@dataclass(frozen=True)
class IdScore:
    """A chosen id with its log probability by the model, before temperature and penalties, and the likeliest ids with theirs."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def id_score(logits: np.ndarray[Any, Any], chosen: int, count: int) -> IdScore:
    """The score of an id that was chosen by logits f[V], and those of the `count` likeliest ids, the likeliest first."""
    scores = logits.astype(np.float64)
    largest = scores.max()
    log_sum = float(largest + np.log(np.exp(scores - largest).sum()))
    count = min(count, len(scores))
    top = np.argpartition(-scores, count - 1)[:count] if count else np.zeros(0, np.int64)
    top = top[np.lexsort((top, -scores[top]))]
    return IdScore(
        int(chosen),
        float(scores[chosen]) - log_sum,
        tuple((int(item), float(scores[item]) - log_sum) for item in top),
    )


def score_count(given: object) -> int | None:
    """How many of the likeliest ids are wanted with each chosen one; None for no scores at all. Raises InputError for another value."""
    if given is None or given is False:
        return None
    count = 0 if given is True else whole_number("logprobs", given)
    if not 0 <= count <= MOST:
        raise InputError(f"logprobs={shown(given)}: give a whole number from 0 to {MOST}")
    return count
