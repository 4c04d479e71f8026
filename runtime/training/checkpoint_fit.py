"""Whether a checkpoint is of this trainer's computation, and which of its settings this trainer has changed."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bmgraph.errors import BundleError
from bmgraph.serialize.bundle import LARGEST_JSON, Bundle
from bmgraph.training.computation import first_difference
from bmgraph.utils.versions import versions

if TYPE_CHECKING:
    from bmgraph.runtime.training.trainer import Trainer

COMPUTATION_FILE = "computation.txt"
"""What the step computes, beside the tensors: `StepProgram.computation`."""


def settings_of(trainer: Trainer) -> dict[str, Any]:
    """The settings of a trainer that do not say what it computes, but how it updates; values of JSON."""
    found = {name: _json(value) for name, value in asdict(trainer.optimizer).items()}
    return {**found, "schedule": repr(trainer.schedule), "clip_norm": trainer.clip_norm}


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
    with bundle.open(COMPUTATION_FILE).stream() as stream:
        text = stream.read(LARGEST_JSON).decode("utf-8", errors="replace")
    difference = first_difference(trainer.state.computation, text)
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


def changed_settings(trainer: Trainer, bundle: Bundle) -> list[str]:
    """What the user is told if the checkpoint was saved with other settings, which this trainer does not take over."""
    then, now = bundle.manifest.get("settings"), settings_of(trainer)
    if not isinstance(then, dict):
        return []
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
