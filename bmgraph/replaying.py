"""replay: the recorded passes of a saved program or engine, run again on a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from bmgraph.backends import resolve_backend
from bmgraph.errors import BundleError, InputError, ResourceError, VerificationError
from bmgraph.frontend.capture import capture
from bmgraph.ir.pass_record import Record, machine
from bmgraph.ir.program import Program
from bmgraph.pass_manager.pass_spec import parse_passes
from bmgraph.pass_manager.target import TORCH, Target
from bmgraph.passes import known_passes
from bmgraph.pipeline import Pipeline
from bmgraph.serialize.bundle import Bundle, read_bundle, strict_json
from bmgraph.serialize.safetensors_io import read_tensors
from bmgraph.utils.digest import same_weights

if TYPE_CHECKING:
    from bmgraph.verify.reference_outputs import Batch


def replay(
    bundle: str | Path,
    model: nn.Module | Program,
    *,
    calibration: Iterable[Batch] | None = None,
    resources: Mapping[str, object] | None = None,
) -> Program:
    """Run the passes recorded in a saved program or engine again, on a model.

    On the same machine, versions and threads (all recorded) and the same resources, the weights come out bit-equal.
    Raises ResourceError where a resource is not the recorded one, VerificationError where the weights differ, with what
    differs between then and now.
    """
    saved = read_bundle(Path(bundle))
    records = _records(saved)
    known = known_passes()
    asked = [record for record in records if not record.within]
    parsed = [
        (name, [item for record in same for item in parse_passes(record.text, known)])
        for name, same in groupby(asked, key=lambda record: record.target)
    ]
    added = {name for record in records for name in record.inputs}
    example = read_tensors(saved.open("example.safetensors"))
    program = (
        model
        if isinstance(model, Program)
        else capture(model, {name: value for name, value in example.items() if name not in added})
    )
    done = program
    for name, passes in parsed:
        done = Pipeline(passes).run(
            done, calibration=calibration, resources=resources, target=_target(name, saved)
        )
    for record, again in zip(records, done.history[len(done.history) - len(records) :]):
        for name, recorded in record.resources.items():
            if again.resources.get(name) != recorded:
                raise ResourceError(
                    f"resource {name!r} is not the one that {record.text} was recorded with: give the same contents"
                )
    if not same_weights(saved.manifest.get("weights"), done):
        then, now = (records[-1].machine if records else {}), machine()
        changed = ", ".join(
            f"{key} {then.get(key)} -> {now[key]}" for key in now if then.get(key) != now[key]
        )
        raise VerificationError(
            f"the replayed weights differ from the saved ones ({changed or 'the model is another one'})"
        )
    return done


def _target(name: str, saved: Bundle) -> Target:
    """The target that a recorded pass was run for."""
    try:
        target: Target = TORCH if name == TORCH.name else resolve_backend(name).target
    except InputError as error:
        raise BundleError(f"{saved.path} was made for an unknown target: {error}") from error
    return target


def _records(saved: Bundle) -> tuple[Record, ...]:
    """The history of a saved program or engine."""
    source = saved.manifest if saved.kind == "engine" else strict_json(saved.open("program.json"))
    try:
        return tuple(Record.from_json(item) for item in source["history"])
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{saved.path} holds no history: {error}") from error
