"""Each pass on a program that is on another device, with calibration there, does what it does on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from tests.helpers.pretend_device import PRETEND, on_pretended

ON_HOST = ("Stream",)
"""Passes that take programs of the host alone."""
TRAINERS = ("Offload", "ZeRO", "ParallelHead", "Remat")
RECIPES = [recipe for recipe in pairs.recipes() if recipe.name not in (*ON_HOST, *TRAINERS)]
QUICK = ("Prune wanda",)
TRAINED = ("Distill", "Relufy")
"""Passes that train a little, in which rounding grows."""
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu), pytest.param(PRETEND, marks=pytest.mark.slow)]


def run_on(device: str, function: Callable[..., Any], *given: Any) -> Any:
    """Run a function where there is the device."""
    return on_pretended(function, *given) if device == PRETEND else function(*given)


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
            yield pytest.param(recipe.name, architecture, "cuda", marks=pytest.mark.gpu, id=f"{name}-cuda")
            quick = recipe.name in QUICK and architecture == "llama"
            yield pytest.param(
                recipe.name,
                architecture,
                PRETEND,
                marks=() if quick else pytest.mark.slow,
                id=f"{name}-pretend",
            )


@pytest.mark.parametrize(("name", "architecture", "device"), list(cases()))
def test_what_a_pass_makes_on_the_device(name: str, architecture: str, device: str, tmp_path: Path) -> None:
    declined = run_on(device, _compare, name, architecture, device, tmp_path)
    if declined:
        pytest.skip(declined)


def _compare(name: str, architecture: str, device: str, folder: Path) -> str:
    """Compare what a pass makes here and there; why it is refused in both places, if it is."""
    recipe = next(item for item in RECIPES if item.name == name)
    chain = [*pairs.needed(recipe), recipe]
    resources: dict[str, Any] = {}
    for item in chain:
        resources |= item.resources(architecture, folder)
    program, batches = pairs.captured(architecture), pairs.toy_batches(architecture, False)

    def made(placed: Callable[[Any], Any]) -> Program:
        pipeline = bg.Pipeline([item.item for item in chain])
        return pipeline.run(
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
        return str(error)[:200]
    found = made(lambda value: there(value, device))
    kind = torch.device(device).type
    assert {item.device.type for item in (*found.parameters.values(), *found.buffers.values())} == {kind}
    batch = {spec.name: host.example[spec.name] for spec in host.inputs}
    expected = host(**batch)
    bound = 2e-2 if name in TRAINED or pairs.has_integers(host) else 1e-3
    for output, value in found(**there(batch, device)).items():
        if value.is_floating_point():
            assert relative_error(value.cpu(), expected[output]) < bound, output
    return ""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", ["", "int8", "int4"])
def test_a_model_of_the_device_is_exported(scheme: str, device: str) -> None:
    assert run_on(device, _exported_drift, scheme, device) < (5e-2 if scheme else 1e-4)


def _exported_drift(scheme: str, device: str) -> float:
    """The distance of an engine on ONNX Runtime from its program, which is on a device."""
    methods: dict[str, tuple[Quantize, ...]] = {
        "": (),
        "int8": (Quantize("int8"),),
        "int4": (Quantize("int4", method="gptq", group=16),),
    }
    batches = [there(batch, device) for batch in pairs.toy_batches("llama", False)]
    program = pairs.captured("llama").to(device)
    engine = bg.compile(program, methods[scheme], backend=Onnx(), calibration=batches)
    assert engine.report.engine_drift is not None
    return engine.report.engine_drift
