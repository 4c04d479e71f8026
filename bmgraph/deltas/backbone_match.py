"""Compares what a delta was trained on with the backbone that it is to be put on."""

from __future__ import annotations

import warnings

from bmgraph.deltas.peft_format import Adapter
from bmgraph.errors import MisplacedError
from bmgraph.ir.computation import Computation
from bmgraph.utils.digest import same_fingerprint


def check_trained_on(adapter: Adapter, backbone: str, now: Computation) -> None:
    """Raise MisplacedError where an adapter was trained on other weights than those of the fingerprint `backbone`, or on a model
    that computes another thing with them than `now`.

    What a model computes is known of programs and adapters of this library, and compared as it was captured, before passes;
    where other versions captured it, a difference is a warning.
    """
    if same_fingerprint(adapter.backbone, backbone) is False:
        raise MisplacedError(
            f"the delta in {adapter.path} was trained on another backbone ({adapter.backbone.removeprefix('2:')[:12]}, this one is "
            f"{backbone.removeprefix('2:')[:12]}): load it on the model that it was trained on"
        )
    then = adapter.computation
    difference = now.difference(then) if then and now and then.lines != now.lines else ""
    if not difference:
        return
    if then.versions == now.versions:
        raise MisplacedError(
            f"the delta in {adapter.path} was trained on a model with equal weights that computes another thing with them "
            f"({difference}): load it on the model that it was trained on, with the same configuration"
        )
    warnings.warn(
        f"the delta in {adapter.path} was saved by other versions ({dict(then.versions)}, now {dict(now.versions)}), which "
        f"write what the model computes otherwise ({difference}): that it is the same model was not checked",
        stacklevel=2,
    )
