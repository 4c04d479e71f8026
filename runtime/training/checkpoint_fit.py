"""Whether a checkpoint is of this trainer's computation, and which of its settings this trainer has changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from bmgraph.errors import BundleError
from bmgraph.ir.eval_form import random_calls
from bmgraph.runtime.training.checkpoint_sections import SECTIONS
from bmgraph.serialize.bundle import Bundle
from bmgraph.training.computation import first_difference
from bmgraph.training.precision import dtypes_of
from bmgraph.utils.versions import versions

if TYPE_CHECKING:
    from bmgraph.runtime.training.trainer import Trainer

COMPUTATION_FILE = "computation.txt"
"""What the step computes, beside the tensors: `StepProgram.computation`."""

EARLIER = {
    "no_decay": False,
    "accumulate": 1,
    "precision": "fp32",
    "reduce_dtype": "fp32",
    "on_nan": "stop",
    "lr_factors": {},
}
"""What settings were in versions that did not have them yet."""


def settings_of(trainer: Trainer) -> dict[str, object]:
    """The settings of a trainer that do not say what it computes, but how it updates; values of JSON."""
    found = {name: _json(value) for name, value in asdict(trainer.optimizer).items()}
    if "no_decay" in found and trainer.optimizer.without_decay() == trainer.optimizer:
        found["no_decay"] = False  # there is no decay
    found |= {"schedule": repr(trainer.schedule), "clip_norm": trainer.clip_norm}
    if trainer.guard.scale is not None:
        found["loss_scale"] = repr(trainer.guard.rule)
    found["lr_factors"] = _counted(trainer.state.outline.lr_factors.values())
    return found | {"accumulate": trainer.accumulate, "on_nan": trainer.on_nan, **dtypes_of(trainer.state)}


def _counted(factors: Iterable[float]) -> dict[str, int]:
    """How many parameters train at each factor of the learning rate, as text: JSON has no other keys."""
    return {f"{factor:g}": count for factor, count in sorted(Counter(factors).items())}


def _json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_computation(trainer: Trainer, bundle: Bundle) -> list[str]:
    """What the user is told if the computation of a checkpoint cannot be compared with this trainer's.

    Raises BundleError if they differ although the versions do not.
    """
    if COMPUTATION_FILE not in bundle.manifest["files"]:
        return [
            f"{bundle.path} does not say what it computed (an earlier version saved it): its tensors fit, and that the "
            "program is the same was not checked"
        ]
    mine = trainer.state.computation
    data = bundle.open(COMPUTATION_FILE).read()
    text = data[: 4 * len(mine) + 1000].decode("utf-8", errors="replace")  # more of it would differ anyway
    difference = first_difference(mine, text)
    if not difference:
        return []
    then, now = bundle.manifest.get("versions"), versions()
    if then == now:
        raise BundleError(
            f"{bundle.path} was saved from another computation, although its tensors fit: {difference}; compile the program "
            "that it was saved from, with the same loss"
        )
    return [
        f"{bundle.path} was saved by other versions ({then}, now {now}), which write its computation otherwise: {difference}; "
        "that the program is the same was not checked"
    ]


def updates_of(bundle: Bundle) -> int:
    """The number of updates that a checkpoint's moments have seen: of its steps, those that were not skipped."""
    sections: Any = bundle.manifest.get(SECTIONS)
    own = sections.get("update") if isinstance(sections, dict) else None
    updates = own.get("updates") if isinstance(own, dict) else None
    steps: int = bundle.manifest["steps"]
    return updates if type(updates) is int and 0 <= updates <= steps else steps


def check_moments(trainer: Trainer, bundle: Bundle) -> None:
    """Raise BundleError unless a checkpoint names all moments of the optimizer, or none where it could have none.

    An optimizer without the moments that it had gathered would begin anew, in the middle of training.
    """
    manifest, optimizer = bundle.manifest, trainer.optimizer
    found, settings = sorted(map(str, manifest["moments"])), manifest.get("settings")
    if found not in ([], sorted(optimizer.moments)):
        raise BundleError(
            f"{bundle.path} holds a part of the optimizer's state, or another one: it was altered"
        )
    steps, kind = updates_of(bundle), type(optimizer).__name__
    if found and not steps:
        raise BundleError(
            f"{bundle.path} was saved after 0 updates, and yet holds {kind}'s {' and '.join(found)}: it was altered; load "
            "another checkpoint"
        )
    if steps and not found and optimizer.keeps_moments(settings if isinstance(settings, dict) else {}):
        raise BundleError(
            f"{bundle.path} was saved after {steps} updates, and yet lacks {kind}'s {' and '.join(optimizer.moments)}, which "
            "would begin anew: it was altered; load another checkpoint"
        )


def new_moments(trainer: Trainer, bundle: Bundle, name: str) -> dict[str, torch.Tensor]:
    """The moments of a tensor that a checkpoint rightly lacks: zeros where this trainer will have made steps with them."""
    if not (bundle.manifest["steps"] and trainer.optimizer.keeps_moments({})):
        return {}
    state = trainer.state.updates[name].state
    return {
        key: torch.zeros(state.shape, dtype=state.dtype, device=state.device)
        for key in trainer.optimizer.moments
    }


def check_names(bundle: Bundle, found: Iterable[str], expected: Iterable[str]) -> None:
    """Raise BundleError if a checkpoint holds tensors that this trainer does not have; missing ones are told when read."""
    more = sorted(set(found) - set(expected))
    if more:
        raise BundleError(
            f"{bundle.path} holds {more[0]!r}{f' and {len(more) - 1} more' if len(more) > 1 else ''}, which this trainer does "
            "not have: it was saved from another program, or altered"
        )


def changed_settings(trainer: Trainer, bundle: Bundle) -> list[str]:
    """What the user is told if the checkpoint was saved with other settings, which this trainer does not take over."""
    then, now = bundle.manifest.get("settings"), settings_of(trainer)
    if not isinstance(then, dict):
        return []
    then = {name: value for name, value in EARLIER.items() if name in now} | then
    changes = [
        f"{name} {then.get(name)} -> {now.get(name)}"
        for name in dict.fromkeys((*then, *now))
        if then.get(name) != now.get(name)
    ]
    if not changes:
        return []
    return [
        f"{bundle.path} was saved with other settings, this trainer goes on with its own: {', '.join(changes)}"
    ]


def changed_ranks(trainer: Trainer, bundle: Bundle) -> list[str]:
    """What the user is told if the checkpoint was saved by another number of ranks, and the step draws random numbers."""
    then, now = bundle.manifest.get("ranks"), trainer.state.ranks.size
    if then in (None, now) or not random_calls(trainer.state.graph):
        return []
    return [
        f"{bundle.path} was saved by {then} rank(s), and {now} go on: each rank draws dropout for its own rows, so it drops "
        "others than those ranks would have"
    ]
