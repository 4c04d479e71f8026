"""Ranks agree on what they call, at which step and with which settings, or all of them stop and say who differs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from bmgraph.distributed.connect import BUILDING
from bmgraph.distributed.link import current
from bmgraph.errors import BundleError, InputError
from bmgraph.runtime.training.checkpoint_fit import settings_of

if TYPE_CHECKING:
    from bmgraph.runtime.training.trainer import Trainer

SAVED, CALL, STEP, SETTINGS = "saved", "call", "step", "settings"
READS_FILES = frozenset({"load", "save_delta", "save_pretrained"})
"""Calls in which a rank may long be busy by itself."""

Given = ParamSpec("Given")
Result = TypeVar("Result")


def together(
    method: Callable[Concatenate[Trainer, Given], Result],
) -> Callable[Concatenate[Trainer, Given], Result]:
    """A method of a trainer in which all ranks take part: they agree on it first (`agree`), and wait for each other as long
    as `Torch(timeout=)` says, or `BUILDING` times as long in the first call of a method and where files are read."""

    @wraps(method)
    def call(trainer: Trainer, /, *args: Given.args, **options: Given.kwargs) -> Result:
        name = method.__name__
        with _waiting(trainer, name):
            agree(trainer, name)
            result = method(trainer, *args, **options)
            trainer.called.add(name)
            return result

    return call


@contextmanager
def _waiting(trainer: Trainer, name: str) -> Iterator[None]:
    """Set how long ranks wait for each other, and say where this one is."""
    link = current() if trainer.state.ranks.size > 1 else None
    if link is None:
        yield
        return
    long = name not in trainer.called or name in READS_FILES
    before, watch = link.seconds, link.watch
    link.set_timeout(trainer.timeout * (BUILDING if long else 1))
    if watch is not None:
        watch.at(f"{name}, after {trainer.steps} steps")
    try:
        yield
    finally:
        link.set_timeout(min(before, trainer.timeout) if "step" in trainer.called else before)
        if watch is not None:
            watch.at(f"its own code outside of the trainer, after {trainer.steps} steps")


def check_settings(trainer: Trainer) -> None:
    """Raise InputError on all ranks, naming the setting and the rank, unless all were built with the same ones."""
    values = {
        **settings_of(trainer),
        "seed": trainer.seed,
        "batch": trainer.batch,
        "timeout": trainer.timeout,
        "optimizer_in_backward": trainer.in_backward is not None,
    }
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

    Every method of a trainer begins with it: ranks that take part in different collectives would wait for each other. It
    also raises, on all ranks, the error of a checkpoint that was being saved meanwhile.
    """
    ranks, failed = trainer.state.ranks, _failed(trainer)
    halfway = "" if trainer.in_backward is None or call == "load" else trainer.in_backward.failed
    call += f" although {halfway}" if halfway else ""
    if ranks.size == 1:
        _raise_failed(trainer, [failed])
        _raise_halfway(halfway)
        return
    settings = {**settings_of(trainer), "seed": trainer.seed}
    entries = {SAVED: failed, CALL: call, STEP: str(trainer.steps), SETTINGS: repr(settings)}
    other = ranks.first_different({name: _digest(text) for name, text in entries.items()})
    if failed or other is not None:  # the same on all ranks: where one alone has failed, they differ
        _raise_failed(trainer, ranks.gather_texts(failed))
    if other is None:
        _raise_halfway(halfway)
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


def check_saved(trainer: Trainer) -> None:
    """Raise BundleError, on all ranks, if a checkpoint could not be saved since the last call; collective."""
    _raise_failed(trainer, trainer.state.ranks.gather_texts(_failed(trainer)))


def _failed(trainer: Trainer) -> str:
    """Why a checkpoint could not be saved on this rank since the last call, "" if none failed."""
    error = trainer.saver.error
    return "" if error is None else str(error)


def _raise_failed(trainer: Trainer, texts: Sequence[str]) -> None:
    for text in texts:
        if text:
            trainer.saver.forget()  # the others may still be about to hear of it
            raise BundleError(text)


def _raise_halfway(text: str) -> None:
    if text:
        raise InputError(text)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
