"""Each pass on a program that is on another device, with calibration there, does what it does on the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
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
from tests.helpers.pretend_device import PRETEND, pretended

ON_HOST = ("Stream",)
"""Passes that take programs of the host alone."""
TRAINERS = ("Offload", "ZeRO", "ParallelHead", "Remat")
RECIPES = [recipe for recipe in pairs.recipes() if recipe.name not in (*ON_HOST, *TRAINERS)]
QUICK = ("Prune wanda", "LoRA")
TRAINED = ("Distill", "Relufy")
"""Passes that train a little, in which rounding grows."""
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu), pytest.param(str(PRETEND), marks=pytest.mark.slow)]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A GPU, or a device that every machine has."""
    with pretended() if request.param == str(PRETEND) else nullcontext():
        yield request.param


def there(value: Any, device: str) -> Any:
    """A program or batches on a device; values that are neither as they are."""
    if isinstance(value, (Program, torch.Tensor)):
        return value.to(device)
    if isinstance(value, dict):
        return {name: there(item, device) for name, item in value.items()}
    return [there(item, device) for item in value] if isinstance(value, (list, tuple)) else value


def cases() -> Iterator[Any]:
    """Each recipe on both devices and two architectures; of the device that every machine has, most are slow."""
    for recipe in RECIPES:
        for architecture in ("llama", "bert"):
            name = f"{recipe.name}-{architecture}"
            yield pytest.param(recipe, architecture, "cuda", marks=pytest.mark.gpu, id=f"{name}-cuda")
            quick = recipe.name in QUICK and architecture == "llama"
            yield pytest.param(
                recipe,
                architecture,
                str(PRETEND),
                marks=() if quick else pytest.mark.slow,
                id=f"{name}-pretend",
            )


@pytest.mark.parametrize(("recipe", "architecture", "device"), list(cases()), indirect=["device"])
def test_what_a_pass_makes_on_the_device(
    recipe: pairs.Recipe, architecture: str, device: str, tmp_path: Path
) -> None:
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
            made(lambda value: there(value, device))
        pytest.skip(str(error)[:200])
    found = made(lambda value: there(value, device))
    assert {item.device.type for item in (*found.parameters.values(), *found.buffers.values())} == {
        torch.device(device).type
    }
    batch = {spec.name: host.example[spec.name] for spec in host.inputs}
    expected, trained = host(**batch), recipe.name in TRAINED
    bound = 2e-2 if trained or pairs._has_integers(host) else 1e-3
    for name, value in found(**there(batch, device)).items():
        if value.is_floating_point():
            assert relative_error(value.cpu(), expected[name]) < bound, name


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("passes", [(), (Quantize("int8"),), (Quantize("int4", method="gptq", group=16),)])
def test_a_model_of_the_device_is_exported(passes: tuple[Quantize, ...], device: str) -> None:
    batches = [there(batch, device) for batch in pairs._batches("llama", False)]
    program = pairs.captured("llama").to(device)
    engine = bg.compile(program, passes, backend=Onnx(), calibration=batches)
    bound = 1e-4 if not passes else 5e-2
    assert engine.report.engine_drift is not None
    assert engine.report.engine_drift < bound
