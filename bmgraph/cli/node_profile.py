"""The profile of a saved engine by its nodes, of the libraries that time them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from bmgraph.runtime.openvino.engine import OpenVinoEngine
from bmgraph.runtime.ort.engine import OrtEngine

if TYPE_CHECKING:
    from bmgraph.runtime.node_times import Profile


def profile_of(loaded: object, batch: Mapping[str, torch.Tensor]) -> Profile | None:
    """The time of every node on a batch; None for what does not time its nodes."""
    if isinstance(loaded, OrtEngine):
        from bmgraph.runtime.ort.profile import profile

        return profile(loaded, _taken(loaded, batch))
    if isinstance(loaded, OpenVinoEngine):
        from bmgraph.runtime.openvino.profile import profile as profile_openvino

        return profile_openvino(loaded, _taken(loaded, batch))
    return None


def _taken(engine: OrtEngine | OpenVinoEngine, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {spec.name for spec in engine.inputs}
    return {key: value for key, value in batch.items() if key in names}
