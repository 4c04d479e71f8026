"""Tries ordered pairs of passes on toy models: a pair gives an engine that agrees with its program, or is refused with a
helpful message.

Add a pass by a row in `RECIPES`; passes of other packages are included automatically, with their defaults. A pair runs
step by step, and deltas and prompts get nonzero values in between, as training would give them: fresh ones change
nothing, so errors in what they add would not show.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import permutations
from pathlib import Path
from typing import Any

import torch

import bmgraph as bg
from bmgraph.backends import AdamW, Onnx, Torch
from bmgraph.deltas.backbone import backbone_of
from bmgraph.errors import BmgraphError, InputError, MisplacedError, OrderError, PassError
from bmgraph.ir.program import Program
from bmgraph.ir.step_rules import GateTarget
from bmgraph.pass_manager.ordering import check_order
from bmgraph.pass_manager.pass_base import Pass
from bmgraph.pass_manager.pass_spec import parse_passes
from bmgraph.passes import (
    L0,
    QAT,
    BitFit,
    ClassRows,
    Deltas,
    Distill,
    Freeze,
    LoadDelta,
    LoRA,
    MoEfy,
    Offload,
    Prune,
    Quantize,
    Relufy,
    Shrink,
    SoftTokens,
    Stream,
    WeightedDelta,
    known_passes,
)
from bmgraph.pipeline import Pipeline
from bmgraph.verify.metrics import relative_error
from tests.helpers.training import LANGUAGE, labelled
from tests.helpers.zoo import BY_NAME, Batch

ARCHITECTURES = ("llama", "bert", "gpt2", "t5")

FLOAT_BOUND, INTEGER_BOUND = 1e-4, 1e-2
"""Largest error of an engine against its program (relative L2), without and with 8-bit weights or activations."""

RUNS, MENDED, MISSING = "runs", "other order", "missing pass"
"""Runs as given; refused with an order that runs; refused with the name of the pass that must come first."""

EXCLUDED, UNFIT, WRONG = "exclude each other", "does not apply", "wrong"
"""Refused because no order is valid, or by a pass in each; one of the two alone is refused on this architecture; any other
outcome (a bug)."""


def _nothing(architecture: str, folder: Path) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class Recipe:
    """How to try a pass: its name in the table, its options, and its resources beside calibration batches."""

    name: str
    item: Pass
    resources: Callable[[str, Path], Mapping[str, Any]] = _nothing


@dataclass(frozen=True)
class Outcome:
    """The outcome of a pair; `error`: relative distance of the engine from its program, if it ran."""

    kind: str
    text: str = ""
    error: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The outcome as JSON values."""
        return asdict(self)


def _saved_delta(name: str, architecture: str, folder: Path) -> dict[str, Any]:
    """A saved delta with nonzero values."""
    place = folder / f"delta-{architecture}"
    if not place.exists():
        tuned = Pipeline([LoRA(r=4, roles=("attention.o", "feedforward.*"), seed=3)]).run(
            captured(architecture)
        )
        _stirred(tuned).save_delta(str(place))
    return {name: str(place)}


def _teacher(architecture: str, folder: Path) -> dict[str, Any]:
    """The model before any pass as the teacher, and batches without labels."""
    return {"teacher": captured(architecture), "text": list(toy_batches(architecture, False))}


RECIPES: tuple[Recipe, ...] = (
    Recipe("Quantize static", Quantize("int8", activations="static")),
    Recipe("Quantize dynamic", Quantize("int8", activations="dynamic")),
    Recipe("Quantize weights", Quantize("int8", activations="none")),
    Recipe("Quantize int4", Quantize("int4", group=16)),
    Recipe("Quantize zero points", Quantize("int4", group=16, symmetric=False)),
    Recipe("Quantize gptq", Quantize("int4", method="gptq", group=16)),
    Recipe("Quantize int2", Quantize("int2", group=16)),
    Recipe("Quantize int3", Quantize("int3", group=16)),
    Recipe("Quantize mixed", Quantize("mixed", average=4.5, group=16)),
    Recipe("QAT", QAT("int8", activations="static")),
    Recipe("LoadDelta", LoadDelta(), partial(_saved_delta, "delta")),
    Recipe("Deltas", Deltas(("one",)), partial(_saved_delta, "one")),
    Recipe("WeightedDelta", WeightedDelta((("one", 0.5),)), partial(_saved_delta, "one")),
    Recipe("Prune", Prune()),
    Recipe("Prune wanda", Prune(score="wanda")),
    Recipe("Prune sparsegpt", Prune(score="sparsegpt")),
    Recipe("Shrink", Shrink(ffn=0.25, heads=0.25)),
    Recipe("Shrink hidden", Shrink(hidden=0.25)),
    Recipe("Shrink layers", Shrink(layers=0.5)),
    Recipe("L0", L0(ffn=0.25, heads=0.25)),
    Recipe("MoEfy", MoEfy(experts=8, active=4)),
    Recipe("Distill", Distill(steps=2, on="hidden"), _teacher),
    Recipe("Relufy", Relufy(steps=2), _teacher),
    Recipe("Stream", Stream("18MB")),
    Recipe("Offload", Offload("optimizer")),
    Recipe("BitFit", BitFit(add=True)),
    Recipe("Freeze", Freeze(except_roles=("feedforward.*",))),
    Recipe("SoftTokens", SoftTokens((3, None))),
    Recipe("ClassRows", ClassRows(((3,), (4, 5)), keep=True)),
)
"""Passes that need more than their defaults; `recipes` adds the others."""


HALF_PRECISION = frozenset({"Cast"})
"""Passes of half-precision programs: the toys are in fp32, so no pair with them applies."""

CHOOSING = frozenset({"Fit"})
"""Passes that become others, which are tried themselves; by default they have nothing to choose from."""


def on_torch_alone(item: Pass) -> bool:
    """Whether engines on torch alone take what a pass makes: pairs with it are lowered to them, others to ONNX Runtime."""
    return isinstance(item, Stream) or (isinstance(item, Quantize) and item.scheme == "int3")


def recipes() -> list[Recipe]:
    """A recipe for every known pass, including other packages' passes, except those in `untried`."""
    named = {type(recipe.item) for recipe in RECIPES}
    others = [
        Recipe(kind.__name__, item)
        for kind in known_passes().values()
        if kind not in named
        and kind.__name__ not in HALF_PRECISION
        and (item := _by_default(kind)) is not None
    ]
    return [*RECIPES, *sorted(others, key=lambda recipe: recipe.name)]


def untried() -> list[str]:
    """Passes that are not tried: those without a row that need options, those that become others, and those of half-precision programs."""
    tried = {type(recipe.item) for recipe in recipes()}
    return sorted(kind.__name__ for kind in known_passes().values() if kind not in tried)


def _by_default(kind: type[Pass]) -> Pass | None:
    try:
        return kind()
    except (TypeError, BmgraphError):
        return None


def pairs() -> list[tuple[Recipe, Recipe]]:
    """Every ordered pair of different passes; two settings of one pass are not a pair."""
    found = recipes()
    return [(a, b) for a in found for b in found if type(a.item) is not type(b.item)]


@cache
def captured(architecture: str, trains: bool = False) -> Program:
    """The toy model; with `trains`, also its labels if it computes a loss from them."""
    return bg.capture(BY_NAME[architecture].build(), toy_batches(architecture, trains)[0], prove=False)


@cache
def toy_batches(architecture: str, trains: bool) -> tuple[Batch, ...]:
    if trains and architecture in LANGUAGE:
        return tuple(labelled(architecture, 4, 12, seed) for seed in range(3))
    return tuple(BY_NAME[architecture].example(4, 12 + index) for index in range(3))


def attempt(tried: Sequence[Recipe], architecture: str, folder: Path) -> Outcome:
    """The outcome of passes in this order on one architecture; `folder` holds the resources' files."""
    tried = [*needed(tried[0], {type(recipe.item) for recipe in tried}), *tried]
    passes = [recipe.item for recipe in tried]
    resources = {
        name: given for recipe in tried for name, given in recipe.resources(architecture, folder).items()
    }
    try:
        check_order(passes)
    except OrderError:
        return _refused(passes, architecture, resources, folder)
    outcome = _ran(passes, architecture, resources)
    if outcome.kind == WRONG:
        for recipe in tried:
            reason = unfit(recipe, architecture, folder)
            if reason:
                return Outcome(UNFIT, reason)
        told = _told(passes, architecture, resources)
        if told is None and _refused_by_a_pass(outcome) and _no_order_runs(passes, architecture, resources):
            return Outcome(EXCLUDED, outcome.text)
        return told or outcome
    return outcome


def needed(recipe: Recipe, besides: Set[type[Pass]] = frozenset()) -> list[Recipe]:
    """What a pass requires before it, of other kinds than `besides`: a delta for `Merge`, rounded weights for `StoreCodes`."""
    able = [other for other in recipes() if type(other.item) not in besides]
    found = [
        next((other for other in able if need in other.item.provides), None)
        for need in sorted(recipe.item.requires)
    ]
    return [other for other in found if other is not None]


NOTHING_TRAINS = f"{InputError.__name__}: the loss depends on no parameter that trains"


def _refused_by_a_pass(outcome: Outcome) -> bool:
    """Or because passes leave a trainer nothing to train, as Merge does behind a delta that was loaded."""
    told = (f"{PassError.__name__}: pass ", f"{MisplacedError.__name__}: pass ", NOTHING_TRAINS)
    return outcome.text.startswith(told)


def _no_order_runs(passes: list[Pass], architecture: str, resources: Mapping[str, Any]) -> bool:
    """Whether passes that each apply alone are refused in every order."""
    for order in permutations(passes):
        try:
            check_order(order)
        except OrderError:
            continue
        if not _refused_by_a_pass(_ran(order, architecture, resources)):
            return False
    return True


@cache
def _trained_first(trains: tuple[Pass, ...], final: tuple[Pass, ...], architecture: str) -> Outcome:
    """The outcome of the `final` passes on a program that the `trains` passes have trained."""
    trainer = bg.compile(
        captured(architecture, True), trains, backend=_backend(trains, architecture),
        calibration=toy_batches(architecture, True),
    )  # fmt: skip
    trainer.step(toy_batches(architecture, True)[0])
    return _compared(final, architecture, {}, trainer.program())


def _told(passes: list[Pass], architecture: str, resources: Mapping[str, Any]) -> Outcome | None:
    """The outcome of following the orders offered to a user for passes that cannot run as given; None where none is
    offered, or if after one attempt per pass none runs."""
    first = ""
    for _ in passes:
        try:
            bg.compile(
                captured(architecture), passes, backend=_backend(passes, architecture), resources=resources,
                calibration=toy_batches(architecture, False),
            )  # fmt: skip
        except OrderError as error:
            first = first or str(error)
            passes = _mended(str(error))
        except BmgraphError:
            return None
        outcome = _ran(passes, architecture, resources)
        if outcome.kind == RUNS:
            return Outcome(MENDED, first, outcome.error)
    return None


@cache
def unfit(recipe: Recipe, architecture: str, folder: Path) -> str:
    """Why a pass, behind those that it requires alone, is refused on an architecture; empty if it is accepted."""
    tried = [*needed(recipe), recipe]
    resources = {name: given for one in tried for name, given in one.resources(architecture, folder).items()}
    outcome = _ran([one.item for one in tried], architecture, resources)
    return outcome.text if _refused_by_a_pass(outcome) else ""


def _refused(passes: list[Pass], architecture: str, resources: Mapping[str, Any], folder: Path) -> Outcome:
    """The message for an invalid order, and whether the order that it offers runs."""
    try:
        bg.compile(captured(architecture), passes, backend=_backend(passes, architecture))
    except OrderError as error:
        text = str(error)
    else:
        return Outcome(WRONG, "the order is refused by check_order and taken by compile")
    mended = _mended(text)
    if not mended:
        if "put one of these before it: " in text:
            return Outcome(MISSING, text)
        return Outcome(EXCLUDED if "no order of these passes is valid" in text else WRONG, text)
    final = re.search(r"then bg\.compile\(trainer\.program\(\), passes=\[(.*?)\]\)$", text)
    if final:
        again = _trained_first(tuple(mended), tuple(parse_passes(final[1], known_passes())), architecture)
    else:
        again = _ran(mended, architecture, resources)
    if again.kind == RUNS:
        return Outcome(MENDED, text, again.error)
    if not final and _refused_by_a_pass(again) and _no_order_runs(mended, architecture, resources):
        return Outcome(EXCLUDED, again.text)
    reasons = [
        reason for recipe in recipes() if type(recipe.item) in {type(item) for item in passes}
        if (reason := unfit(recipe, architecture, folder))
    ]  # fmt: skip
    return Outcome(UNFIT, reasons[0]) if reasons else Outcome(WRONG, f"the order offered fails: {again.text}")


def _mended(text: str) -> list[Pass]:
    found = re.search(r"try this order: passes=\[(.*?)\](?:$|, then)", text)
    return parse_passes(found[1], known_passes()) if found else []


_OUTCOMES: dict[tuple[str, tuple[Pass, ...]], Outcome] = {}
"""Outcomes of passes in a valid order, by architecture: an order that a message offers is often another pair of the table."""

_BEGUN: dict[tuple[str, str, bool, Pass], Program] = {}
"""Programs after one pass, by architecture, target and whether they train: many pairs begin alike."""


def _ran(passes: Sequence[Pass], architecture: str, resources: Mapping[str, Any]) -> Outcome:
    """The outcome of passes in a valid order on the toy; what a pass is given depends on it and the toy alone."""
    key = (architecture, tuple(passes))
    if key not in _OUTCOMES:
        _OUTCOMES[key] = _compared(passes, architecture, resources)
    return _OUTCOMES[key]


def attempt_on(backend: Any, recipe: Recipe, architecture: str, folder: Path) -> Outcome:
    """The outcome of one pass of the model stage on another backend than ONNX Runtime."""
    resources = recipe.resources(architecture, folder)
    outcome = _compared([recipe.item], architecture, resources, backend=backend)
    if outcome.kind == WRONG and _refused_by_a_pass(outcome):
        return Outcome(UNFIT, outcome.text)
    return outcome


def _compared(
    passes: Sequence[Pass],
    architecture: str,
    resources: Mapping[str, Any],
    given: Program | None = None,
    backend: Any = None,
) -> Outcome:
    """Run passes in a valid order on the toy, or on the given program; lower, to the backend if one is given, and compare."""
    shared = backend is None and given is None
    backend = backend or _backend(passes, architecture)
    before = [item for item in passes if item.acts_on == "model"]
    trains = _trains(backend)
    program, batches = given or captured(architecture, trains), toy_batches(architecture, trains)
    try:
        for index, item in enumerate(before):
            begun = (architecture, backend.name, trains, item) if index == 0 and shared else None
            if begun is not None and begun in _BEGUN:
                program = _BEGUN[begun]
                continue
            made = Pipeline([item]).run(
                program, calibration=batches, resources=resources, target=backend.target
            )
            program = _stirred(made)
            if begun is not None:
                _BEGUN[begun] = program
        later = [item for item in passes if item.acts_on != "model"]
        if trains:
            error = _trainer_error(program, later, backend, batches)
        else:
            engine = bg.compile(program, later, backend=backend, calibration=batches)
            error = engine.report.engine_drift
            if has_integers(program):
                error = _median_error(engine, program)
    except BmgraphError as problem:
        return Outcome(WRONG, f"{type(problem).__name__}: {problem}")
    except Exception as problem:  # errors that no user can act on are what this test looks for
        return Outcome(WRONG, f"unexpected {type(problem).__name__}: {str(problem)[:300]}")
    assert error is not None
    bound = INTEGER_BOUND if has_integers(program) else FLOAT_BOUND
    if not error <= bound:
        return Outcome(WRONG, f"the engine is {error:.1e} from its program, more than {bound:.0e}", error)
    return Outcome(RUNS, "", error)


def _backend(passes: Sequence[Pass], architecture: str) -> Any:
    if all(item.acts_on != "step" for item in passes):
        return Torch() if any(map(on_torch_alone, passes)) else Onnx()
    return Torch(optimizer=AdamW(lr=1e-3), loss="loss" if architecture in LANGUAGE else _squares)


def _trains(backend: Any) -> bool:
    return isinstance(backend, Torch) and backend.optimizer is not None


def _squares(
    outputs: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The squared hidden states of tokens that are not padding."""
    kept = inputs["attention_mask"].to(torch.float32)
    return (outputs["last_hidden_state"].square().sum(-1) * kept).sum(), kept.sum()


def _trainer_error(program: Program, passes: list[Pass], backend: Torch, batches: tuple[Batch, ...]) -> float:
    """The relative error of the loss of a trainer's first step against the program's loss on the same batch; of its evaluation in front
    of that step where steps draw gates."""
    batch = next((item for item in batches if _fits(program, item)), program.example)
    trainer = bg.compile(program, passes, backend=backend)
    draws = any(isinstance(rule, GateTarget) for rule in program.step_rules)
    evaluated = trainer.evaluate([batch]).loss if draws else None
    stepped = trainer.step(batch).loss
    found = torch.tensor(stepped if evaluated is None else evaluated)
    outputs = program(**{spec.name: batch[spec.name] for spec in program.inputs})
    if isinstance(backend.loss, str):
        return relative_error(found, outputs[backend.loss])
    summed, count = backend.loss(outputs, batch)
    return relative_error(found, summed / count)


def _median_error(engine: Any, program: Program) -> float:
    """The median error of an engine against its program on three batches; a real fault shows on all of them. Where an
    activation is at a rounding tie, the last bit of a sum (which depends on its order) shifts a batch by up to a step."""
    errors = []
    for seed in range(3):
        batch = _other(program, seed)
        found, expected = engine(**batch), program(**batch)
        errors.append(
            max(
                relative_error(torch.as_tensor(found[spec.name]), expected[spec.name])
                for spec in engine.outputs
            )
        )
    return sorted(errors)[1]


def _other(program: Program, seed: int) -> Batch:
    """The example with its ids permuted."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value.flatten()[torch.randperm(value.numel(), generator=generator)].reshape(value.shape)
        if "ids" in name else value
        for name, value in program.example.items()
    }  # fmt: skip


def _fits(program: Program, batch: Batch) -> bool:
    return all(spec.name in batch for spec in program.inputs)


def has_integers(program: Program) -> bool:
    ours = torch.ops.bmgraph
    integer = (
        ours.dequantize.default, ours.quantize_static.default, ours.quantize_dynamic.default, ours.quantize_blocks.default,
    )  # fmt: skip
    return any(node.target in integer for node in program.graph.nodes)


def _stirred(program: Program) -> Program:
    """The program with other values where fresh deltas change nothing: parameters that are zero (B of LoRA), or of deltas and
    constant (the scales of IA3), and biases of the model that train."""
    moved, backbone = program.clone(), backbone_of(program)
    generator = torch.Generator().manual_seed(5)
    for name, value in program.parameters.items():
        if name in program.frozen:
            continue
        fresh = value.dim() > 1 and not bool(value.any())
        constant = name not in backbone and bool((value == value.flatten()[:1]).all())
        if fresh or constant or name in program.trained_whole:
            moved.parameters[name] = value + 0.1 * torch.randn(value.shape, generator=generator)
    return moved
