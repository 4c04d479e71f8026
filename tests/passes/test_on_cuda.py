"""Each pass on a program that is on a CUDA device, with calibration there, does what it does on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bmgraph as bg
from bmgraph.backends import Onnx, Torch
from bmgraph.errors import PassError
from bmgraph.ir.program import Program
from bmgraph.passes import Quantize
from bmgraph.verify.metrics import relative_error
from tests.helpers import pairs

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
ON_HOST = ("Stream",)
"""Passes that take programs of the host alone."""
TRAINERS = ("Offload", "ZeRO", "ParallelHead", "Remat")
RECIPES = [recipe for recipe in pairs.recipes() if recipe.name not in (*ON_HOST, *TRAINERS)]


def there(value: Any) -> Any:
    """A program or batches on the device; values that are neither as they are."""
    if isinstance(value, (Program, torch.Tensor)):
        return value.to(DEVICE)
    if isinstance(value, dict):
        return {name: there(item) for name, item in value.items()}
    return [there(item) for item in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("architecture", ["llama", "bert"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_what_a_pass_makes_on_the_device(recipe: pairs.Recipe, architecture: str, tmp_path: Path) -> None:
    tried = [item.item for item in (*pairs._needed(recipe), recipe)]
    resources: dict[str, Any] = {}
    for item in (*pairs._needed(recipe), recipe):
        resources |= item.resources(architecture, tmp_path)
    program, batches = pairs.captured(architecture), pairs._batches(architecture, False)

    def made(placed: Any) -> Program:
        return bg.Pipeline(tried).run(
            placed(program),
            calibration=placed(list(batches)),
            resources=placed(resources),
            target=Torch().target,
        )

    try:
        host = made(lambda value: value)
    except PassError as error:
        with pytest.raises(PassError):
            made(there)
        pytest.skip(str(error)[:200])
    found = made(there)
    assert {item.device.type for item in (*found.parameters.values(), *found.buffers.values())} == {DEVICE}
    batch = {spec.name: host.example[spec.name] for spec in host.inputs}
    expected, trained = host(**batch), recipe.name in ("Distill", "Relufy")
    bound = 2e-2 if trained or pairs._has_integers(host) else 1e-3
    for name, value in found(**there(batch)).items():
        if value.is_floating_point():
            assert relative_error(value.cpu(), expected[name]) < bound, name


@pytest.mark.parametrize("passes", [(), (Quantize("int8"),), (Quantize("int4", method="gptq", group=16),)])
def test_a_model_of_the_device_is_exported(passes: tuple[Quantize, ...]) -> None:
    batches = [there(batch) for batch in pairs._batches("llama", False)]
    program = pairs.captured("llama").to(DEVICE)
    engine = bg.compile(program, passes, backend=Onnx(), calibration=batches)
    bound = 1e-4 if not passes else 5e-2
    assert engine.report.engine_drift is not None
    assert engine.report.engine_drift < bound
