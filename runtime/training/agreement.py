"""Ranks agree on what they call, at which step and with which settings, or all of them stop and say who differs."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from bmgraph.errors import BmgraphError, InputError
from bmgraph.runtime.training.checkpoint_fit import settings_of

if TYPE_CHECKING:
    from bmgraph.runtime.training.trainer import Trainer

CALL, STEP, SETTINGS = "call", "step", "settings"


def check_settings(trainer: Trainer) -> None:
    """Raise InputError on all ranks, naming the setting and the rank, unless all were built with the same ones."""
    values = {**settings_of(trainer), "seed": trainer.seed, "batch": trainer.batch}
    kind = type(trainer.optimizer).__name__
    values = {"optimizer": kind, **values}
    values["computation"] = trainer.state.computation
    ranks, advice = trainer.state.ranks, "the same optimizer and settings"
    ranks.check_same("optimizer", {"optimizer": _digest(kind)}, advice)
    ranks.check_same(
        "set of settings", {f"{name}=": _digest(repr(value)) for name, value in values.items()}, advice
    )


def agree(trainer: Trainer, call: str) -> None:
    """Raise InputError on all ranks unless all make the same call, at the same step, with the same settings.

    Every method of a trainer begins with it: ranks that take part in different collectives would wait for each other.
    """
    ranks = trainer.state.ranks
    if ranks.size == 1:
        return
    settings = {**settings_of(trainer), "seed": trainer.seed}
    entries = {CALL: call, STEP: str(trainer.steps), SETTINGS: repr(settings)}
    try:
        other = ranks.first_different({name: _digest(text) for name, text in entries.items()})
    except RuntimeError as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise BmgraphError(
            f"a rank has left, or does not answer within the group's timeout; what it wrote last says why ({first})"
        ) from error
    if other is None:
        return
    rank, what = other
    calls, steps = (ranks.gather_texts(text) for text in (call, str(trainer.steps)))
    if what == CALL:
        raise InputError(
            f"rank {rank} calls {calls[rank]} where rank 0 calls {calls[0]}: all ranks make the same calls in the same order"
        )
    if what == STEP:
        raise InputError(
            f"rank {rank} has made {steps[rank]} steps, rank 0 {steps[0]}: load a checkpoint on all ranks, or on none"
        )
    raise InputError(
        f"rank {rank} has another optimizer, learning rate, schedule, clipping or seed than rank 0 since it was built: "
        "change settings on all ranks alike"
    )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
