"""WeightedDelta and Merge(weights=): sums of deltas as PEFT adds them up, and as naive sums of weights; merging into int8 codes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import bmgraph as bg
from bmgraph.deltas.family import Change
from bmgraph.deltas.registry import deltas_of
from bmgraph.deltas.weighted_sum import sum_of_factors
from bmgraph.errors import InputError, OrderError, PassError, ResourceError
from bmgraph.ir.program import Program
from bmgraph.passes import IA3, BitFit, DoRA, LoadDelta, LoRA, Merge, Quantize, VeRA, WeightedDelta
from bmgraph.passes.deltas.delta_pass import DeltaPass
from bmgraph.verify.metrics import relative_error
from tests.helpers.captured import captured
from tests.helpers.models import TinyEncoder, tokens
from tests.helpers.peft_models import EXACT, stirred

WEIGHTS = {"one": 0.7, "other": -0.4}
BATCH = tokens(2, 6, 3)


def saved(program: Program, folder: Path, one: DeltaPass, other: DeltaPass) -> dict[str, Path]:
    """Two trained deltas of a program in folders, by name."""
    for seed, (name, item) in enumerate((("one", one), ("other", other))):
        stirred(bg.Pipeline([item]).run(program, verify="off"), seed=seed).save_delta(str(folder / name))
    return {name: folder / name for name in ("one", "other")}


@pytest.fixture(scope="module")
def given(program: Program, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two LoRAs of one rank with other scales, which share the queries."""
    folder = tmp_path_factory.mktemp("deltas")
    return saved(program, folder, LoRA(r=3, targets=("q", "v")), LoRA(r=3, alpha=5, targets=("q", "up")))


def summed(program: Program, given: dict[str, Path], **options: Any) -> Program:
    return bg.Pipeline([WeightedDelta(WEIGHTS, **options)]).run(program, resources=given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def theirs(model: TinyEncoder, given: dict[str, Path]) -> Any:
    peft = pytest.importorskip("peft")
    tuned = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(given["one"]), adapter_name="one")
    tuned.load_adapter(str(given["other"]), adapter_name="other")
    return tuned.eval()


@pytest.mark.slow
@pytest.mark.parametrize(("how", "rank"), [("cat", None), ("linear", None), ("svd", None), ("svd", 2)])
def test_it_is_the_sum_of_peft(
    how: Any, rank: int | None, theirs: Any, program: Program, given: dict[str, Path]
) -> None:
    name = f"{how}{rank}"
    theirs.add_weighted_adapter(
        list(WEIGHTS), list(WEIGHTS.values()), name, combination_type=how, svd_rank=rank
    )
    theirs.set_adapter(name)
    with torch.no_grad():
        expected = theirs(**BATCH)["logits"]
    ours = summed(program, given, combination_type=how, svd_rank=rank)
    assert relative_error(ours(**BATCH)["logits"], expected) < EXACT
    merge = Merge(weights=WEIGHTS, combination=how, rank=rank)  # type: ignore[arg-type]
    merged = bg.Pipeline([merge]).run(program, resources=given)
    assert relative_error(merged(**BATCH)["logits"], expected) < EXACT
    assert set(merged.parameters) == set(program.parameters)


@pytest.mark.parametrize("rank", [None, 2])
def test_factors_are_added_up_as_the_formulas_say(rank: int | None) -> None:
    changes = [
        (weight, Change({"a": torch.randn(3, 7), "b": torch.randn(5, 3)}, {"scale": scale}))
        for weight, scale in ((0.7, 2.0), (-0.4, 0.5))
    ]
    exact = sum(w * c.numbers["scale"] * c.tensors["b"] @ c.tensors["a"] for w, c in changes)
    assert isinstance(exact, torch.Tensor)
    u, sizes, v = torch.linalg.svd(exact)
    kept = rank or 3
    roots = [(abs(w * c.numbers["scale"]) ** 0.5, w < 0, c.tensors) for w, c in changes]
    a = sum((-1) ** negative * root * t["a"] for root, negative, t in roots)
    b = sum(root * t["b"] for root, _, t in roots)
    for how, expected in {
        "cat": exact,
        "svd": u[:, :kept] * sizes[:kept] @ v[:kept],
        "linear": b @ a,  # type: ignore[operator]
    }.items():
        found = sum_of_factors(changes, how, rank, "q")  # type: ignore[arg-type]
        assert torch.allclose(found.tensors["b"] @ found.tensors["a"], expected, atol=1e-5), how
        assert found.numbers == {"scale": 1.0}


def test_it_is_the_naive_sum_and_one_delta(program: Program, given: dict[str, Path], tmp_path: Path) -> None:
    total = summed(program, given)
    ranks = {delta.site: len(delta.change(total).tensors["a"]) for delta in deltas_of(total.graph)}
    assert ranks["blocks.0.q.weight"] == 6
    assert ranks["blocks.0.v.weight"] == ranks["blocks.0.up.weight"] == 3
    total.save_delta(str(tmp_path / "sum"))
    again = bg.Pipeline([LoadDelta("sum")]).run(program, resources={"sum": tmp_path / "sum"})
    assert torch.equal(again(**BATCH)["logits"], total(**BATCH)["logits"])
    merged = bg.Pipeline([Merge(weights=WEIGHTS)]).run(program, resources=given)  # type: ignore[arg-type]
    expected = dict(program.parameters)
    for name, weight in WEIGHTS.items():
        alone = bg.Pipeline([LoadDelta(name), Merge()]).run(program, resources=given)
        for key, value in alone.parameters.items():
            expected[key] = expected[key] + weight * (value - program.parameters[key])
    for key, value in expected.items():
        assert torch.allclose(merged.parameters[key], value, atol=1e-5), key
    assert [record.text for record in merged.history if not record.within] == [
        "merge{weights=[[one,0.7],[other,-0.4]]}"
    ]


def test_scales_and_biases_are_added_up_as_they_are(
    model: TinyEncoder, program: Program, tmp_path: Path
) -> None:
    scales = saved(program, tmp_path / "scales", IA3(), IA3())
    total = bg.Pipeline([WeightedDelta({"one": 0.6, "other": 0.4}, "linear")]).run(program, resources=scales)  # type: ignore[arg-type]
    each = [bg.Pipeline([LoadDelta(name)]).run(program, resources=scales) for name in WEIGHTS]
    for name in set(total.parameters) - total.frozen:
        one, other = (item.parameters[name] for item in each)
        assert torch.allclose(total.parameters[name], 0.6 * one + 0.4 * other)
    with pytest.raises(PassError, match="give combination='linear', not 'cat'"):
        summed(program, scales)
    bare = bg.capture(torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False)), (torch.randn(2, 4),))
    shifts = saved(bare, tmp_path / "shifts", BitFit(add=True), BitFit(add=True))
    merged = bg.Pipeline([Merge(weights=WEIGHTS)]).run(bare, resources=shifts)  # type: ignore[arg-type]
    (bias,) = (merged.parameters[name] for name in merged.parameters if "bias" in name)
    found = [bg.Pipeline([LoadDelta(name)]).run(bare, resources=shifts).parameters for name in WEIGHTS]
    expected = sum(
        weight * next(value for key, value in own.items() if key.endswith("shift"))
        for weight, own in zip(WEIGHTS.values(), found)
    )
    assert torch.allclose(bias, expected)  # type: ignore[arg-type]


def test_what_has_no_sum_is_told(program: Program, given: dict[str, Path], tmp_path: Path) -> None:
    mixed = saved(program, tmp_path / "mixed", LoRA(r=2), LoRA(r=3))
    with pytest.raises(PassError, match=r"blocks.0.q: the deltas have the ranks 2, 3.*choose 'cat' or 'svd'"):
        summed(program, mixed, combination="linear")
    families = saved(program, tmp_path / "families", DoRA(r=2), LoRA(r=2))
    with pytest.raises(PassError, match="of one family: these are 'one' of 'dora', 'other' of 'lora'"):
        summed(program, families)
    with pytest.raises(
        PassError, match=r"delta 'one' in .* is of the family 'dora', of which there is no weigh"
    ):
        summed(program, {"one": families["one"], "other": families["one"]})
    whole = saved(program, tmp_path / "whole", LoRA(r=2, modules_to_save=("head",)), LoRA(r=2))
    with pytest.raises(PassError, match=r"delta 'one' .* changes head.*whole.*no weighted sum"):
        summed(program, whole)
    with pytest.raises(ResourceError, match="'other', which was not given"):
        summed(program, {"one": given["one"]})
    for weights, options, message in (
        ({}, {}, "give each delta once"),
        ({"one": 0.0}, {}, "the weight of 'one' is 0.0: give a number other than 0"),
        ({"one": 1.0}, {"rank": 2}, "rank=2: give a rank of at least 1, with combination='svd'"),
    ):
        with pytest.raises(InputError, match=message):
            WeightedDelta(weights, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="rank is that of a weighted sum"):
        Merge(rank=2)
    with pytest.raises(OrderError, match="merge requires delta"):
        bg.compile(program, [Merge()])


def test_it_is_merged_into_codes_within_the_stated_error(program: Program) -> None:
    codes = bg.Pipeline([Quantize("int8", activations="none", smallest=1)]).run(program)
    tuned = stirred(bg.Pipeline([LoRA(r=2, targets=("q", "head"))]).run(codes), 0.1)
    done = bg.Pipeline([Merge(requantize=0.02)]).run(tuned)
    assert not deltas_of(done.graph)
    assert set(done.parameters) == set(codes.parameters)
    assert relative_error(done(**BATCH)["logits"], tuned(**BATCH)["logits"]) < 0.05
    for delta in deltas_of(tuned.graph):
        change, stem = delta.change(tuned), delta.site
        old = codes.parameters[f"{stem}_codes"] * codes.parameters[f"{stem}_scale"][:, None]
        moved = old + change.numbers["scale"] * change.tensors["b"] @ change.tensors["a"]
        expected, scale, _ = Quantize("int8").codes(moved, 0)
        assert torch.equal(done.parameters[f"{stem}_codes"], expected)
        error = relative_error(expected * scale[:, None], moved)
        said = next(edit.what for edit in done.history[-1].edits if edit.site == stem)
        assert said == f"folded into int8 codes, which are {error:.2g} (relative) from the weight"
    with pytest.raises(PassError, match=r"its weight would move by 0.0\d+ \(relative\), more than 0.001"):
        bg.Pipeline([Merge(requantize=0.001)]).run(tuned)
    static = bg.Pipeline([Quantize("int8", activations="dynamic", smallest=1), LoRA(r=2)]).run(program)
    with pytest.raises(
        PassError, match="its input is rounded, and merged the delta would read what is rounded"
    ):
        bg.Pipeline([Merge(requantize=0.02)]).run(stirred(static))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("item", [LoRA(r=2), DoRA(r=2), IA3(), VeRA(r=4), BitFit(add=True)], ids=str)
def test_every_family_that_folds_goes_into_codes(item: DeltaPass, name: str) -> None:
    """Also where weights are stored [in, out], and several deltas are on one linear."""
    codes = bg.Pipeline([Quantize("int8", activations="none", smallest=1)]).run(captured(name)[1])
    others: list[Any] = [] if isinstance(item, DoRA) else [LoRA(r=1, roles=("attention.q",))]
    tuned = stirred(bg.Pipeline([*others, item]).run(codes, verify="off"), 0.05)
    done = bg.Pipeline([Merge(requantize=0.03)]).run(tuned)
    assert not deltas_of(done.graph)
    assert {key for key in done.parameters if key.endswith("_codes")} == {
        key for key in codes.parameters if key.endswith("_codes")
    }
    given = tuned.example
    assert relative_error(done(**given)["logits"], tuned(**given)["logits"]) < 0.05
