"""Weights of a built plan are exchanged: which, for which programs, and what refuses them. TensorRT's own part needs a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bmgraph as bg
from bmgraph.backends import TensorRT
from bmgraph.backends.tensorrt import backend
from bmgraph.backends.tensorrt.backend import constants
from bmgraph.backends.tensorrt.legalize import lower
from bmgraph.errors import BackendError, BundleError, InputError, VerificationError
from bmgraph.ir.program import Program
from bmgraph.lowering.to_exported_program import deployed
from bmgraph.passes import LoRA, Merge, Quantize
from bmgraph.runtime.tensorrt import hardware
from bmgraph.runtime.tensorrt.engine import TensorRTEngine
from bmgraph.runtime.tensorrt.library import import_tensorrt
from bmgraph.runtime.tensorrt.refit import RefitForm, set_weights
from tests.helpers.bundles import edit_json
from tests.helpers.models import tiny_encoder, tokens

if not (find_spec("tensorrt") or find_spec("tensorrt_rtx")):
    pytest.skip("neither tensorrt nor tensorrt-rtx is installed", allow_module_level=True)


def form_of(program: Program) -> RefitForm:
    return RefitForm.of(deployed(program), constants(lower(deployed(program))))


@pytest.fixture(scope="module")
def form(program: Program) -> RefitForm:
    return form_of(program)


@pytest.fixture(scope="module")
def merged(program: Program) -> Program:
    """The program with a delta of some size in its weights."""
    made = bg.Pipeline([LoRA(r=4)]).run(program)
    generator = torch.Generator().manual_seed(0)
    for name, value in list(made.parameters.items()):
        if "lora" in name.lower():
            made.parameters[name] = torch.randn(value.shape, generator=generator) * 0.2
    return bg.Pipeline([Merge()]).run(made)


@pytest.fixture(scope="module")
def built(program: Program) -> TensorRTEngine:
    return bg.compile(program, backend="tensorrt")


class InMemory:
    """A session that computes on the CPU what a plan of the program does, with the weights that it was given."""

    def __init__(self, program: Program, form: RefitForm, wrong: bool = False) -> None:
        self.program, self.weights, self.wrong = program.clone(), form.weights, wrong
        self.changed: set[str] = set()

    def run(
        self, batch: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.dtype]
    ) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.program(**batch).items() if name in outputs}

    def refit(self, values: Mapping[str, torch.Tensor], changed: set[str]) -> bytes:
        self.changed = changed
        if not self.wrong:
            self.program.parameters |= {
                name: values[held.constant].T if held.turned else values[held.constant]
                for name, held in self.weights.items()
                if name in self.program.parameters
            }
        return b"another plan"


@pytest.fixture
def engine(
    program: Program, built: TensorRTEngine, form: RefitForm, monkeypatch: pytest.MonkeyPatch
) -> TensorRTEngine:
    monkeypatch.setattr(TensorRTEngine, "unable", "")
    monkeypatch.setattr(built, "refits", form)
    monkeypatch.setattr(built, "plan", built.plan)
    monkeypatch.setattr(built, "report", SimpleNamespace(**vars(built.report)))
    monkeypatch.setitem(built.__dict__, "_session", InMemory(program, form))
    return built


def test_all_weights_of_a_float_model_can_be_exchanged(program: Program, form: RefitForm) -> None:
    plain = {
        name for name, value in program.parameters.items() if bool(value.flatten()[0] != value.flatten()[-1])
    }
    assert plain <= set(form.weights)  # zeros and ones are those of several
    assert RefitForm.from_json(form.as_json()) == form


def test_a_merged_delta_becomes_the_weights(
    engine: TensorRTEngine, merged: Program, program: Program
) -> None:
    engine.refit(merged)
    batch = tokens(3, 7)
    for name, value in merged(**batch).items():
        assert torch.equal(engine(**batch)[name], value)
        assert not torch.allclose(value, program(**batch)[name])
    assert 0 < len(engine._session.changed) < len(program.parameters)  # type: ignore[attr-defined]
    assert bytes(engine.plan.read()) == b"another plan"
    assert engine.report.notes[-1].endswith("weights were exchanged")
    engine.refit(merged)  # nothing is left to exchange


def test_what_computes_something_else_is_refused(engine: TensorRTEngine, program: Program) -> None:
    wider = bg.capture(tiny_encoder(hidden=48), tokens())
    smaller = bg.Pipeline([Quantize("int8", activations="none")]).run(program)
    for other in (wider, smaller):
        with pytest.raises(
            InputError, match="refit: the program does not compute what the engine was built from"
        ):
            engine.refit(other)
    with pytest.raises(InputError, match="meta device"):
        engine.refit(program.to("meta"))


def test_a_weight_in_another_form_is_refused_if_it_changed(
    engine: TensorRTEngine, program: Program, merged: Program, form: RefitForm
) -> None:
    name = next(
        name for name in form.weights if not torch.equal(merged.parameters[name], program.parameters[name])
    )
    rest = {key: value for key, value in form.weights.items() if key != name}
    engine.refits = RefitForm(form.text, rest, {name: form.weights[name].digest})
    with pytest.raises(InputError, match=rf"{name} changed, and the engine holds it in another form"):
        engine.refit(merged)
    engine.refit(program)


def test_an_engine_that_then_computes_something_else_is_what_it_was(
    engine: TensorRTEngine, program: Program, merged: Program, form: RefitForm
) -> None:
    engine.__dict__["_session"] = InMemory(program, form, wrong=True)
    plan = engine.plan
    with pytest.raises(VerificationError):
        engine.refit(merged)
    assert (engine.plan, engine.refits) == (plan, form)
    assert "_session" not in engine.__dict__  # the plan is loaded anew


def test_it_is_asked_for_where_the_gpu_is(
    program: Program, built: TensorRTEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "this_capability", lambda: "")
    with pytest.raises(BackendError, match=r"TensorRT\(refit=True\).*this machine has no CUDA GPU"):
        bg.compile(program, backend=TensorRT(refit=True))
    monkeypatch.setattr(backend, "this_capability", lambda: "8.9")
    with pytest.raises(InputError, match=r"built for this machine's GPU \(8\.9\) only"):
        bg.compile(program, backend=TensorRT(refit=True, capabilities=("8.6",)))
    with pytest.raises(BackendError, match=r"compile with TensorRT\(refit=True\)"):
        built.refit(program)


def test_a_bundle_says_what_can_be_exchanged(
    built: TensorRTEngine, form: RefitForm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "this_capability", lambda: built.hardware.capabilities[0])
    monkeypatch.setattr(built, "refits", form)
    built.save(tmp_path / "out")
    loaded: Any = bg.load(tmp_path / "out", trust=True, cache=str(tmp_path / "kernels"))
    assert loaded.refits == form
    assert loaded.kernels == tmp_path / "kernels"
    edit_json(tmp_path / "out" / "manifest.json", lambda manifest: manifest.update(refit={"text": 3}))
    with pytest.raises(BundleError, match="does not say its hardware"):
        bg.load(tmp_path / "out", trust=True)


class Refitter:
    """TensorRT's, with weights of these sizes."""

    def __init__(
        self, sizes: Mapping[str, int], stuck: str = "", missing: tuple[str, ...] = (), works: bool = True
    ) -> None:
        self.sizes, self.stuck, self.missing, self.works = sizes, stuck, missing, works
        self.given: dict[str, Any] = {}

    def get_all_weights(self) -> list[str]:
        return list(self.sizes)

    def get_weights_prototype(self, name: str) -> Any:
        trt = import_tensorrt()
        return trt.Weights(trt.float32, 0, self.sizes[name])

    def set_named_weights(self, name: str, weights: Any) -> bool:
        self.given[name] = weights.numpy().copy()
        return name != self.stuck

    def get_missing_weights(self) -> tuple[str, ...]:
        return self.missing

    def refit_cuda_engine(self) -> bool:
        return self.works


def test_what_tensorrt_is_given_and_what_it_refuses() -> None:
    values = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2), "folded": torch.ones(1)}
    taken = Refitter({"a": 6, "b": 2})
    assert set_weights(import_tensorrt(), taken, values, {"a"}) == ""
    assert {name: list(value) for name, value in taken.given.items()} == {
        "a": [0, 1, 2, 3, 4, 5],
        "b": [1, 1],
    }
    for refitter, problem in (
        (Refitter({"a": 6}), "folded is not among the weights that the plan exchanges"),
        (Refitter({"a": 5, "folded": 1}), "a has 6 values, and the plan 5"),
        (Refitter({"a": 6, "folded": 1}, stuck="a"), "a is refused"),
        (Refitter({"a": 6, "folded": 1}, missing=("c",)), "c is missing"),
        (Refitter({"a": 6, "folded": 1}, works=False), "the weights were not written"),
    ):
        assert set_weights(import_tensorrt(), refitter, values, {"folded"}) == problem


@pytest.mark.gpu
def test_on_a_gpu_the_engine_computes_what_the_other_program_does(
    program: Program, merged: Program, tmp_path: Path
) -> None:
    try:
        made: Any = bg.compile(program, backend=TensorRT(refit=True))
    except (BackendError, InputError) as error:
        pytest.skip(f"not built: {error}")
    made.refit(merged)
    made.save(tmp_path / "out")
    for engine in (made, bg.load(tmp_path / "out", trust=True)):
        for name, value in merged(**tokens()).items():
            torch.testing.assert_close(engine(**tokens())[name], value, rtol=1e-3, atol=1e-3)
