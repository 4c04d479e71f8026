"""How MoEfy groups neurons and chooses experts: splits, shared experts, routers, labels, thresholds, budgets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bmgraph as bg
from bmgraph.analysis.interpreter import Observed
from bmgraph.errors import InputError, PassError, ResourceError
from bmgraph.ir.program import Program
from bmgraph.passes import LoRA, MoEfy, Quantize
from bmgraph.passes.moefy.active_experts import lost_shares
from bmgraph.passes.moefy.balanced_kmeans import EMPTY
from bmgraph.passes.moefy.coactivation import METIS, NETWORKX, coactive_groups
from bmgraph.passes.moefy.router import centroid_router, mean_above
from bmgraph.verify.metrics import relative_error
from tests.helpers.deltas import trained
from tests.helpers.feedforwards import (
    NEURON_COUNT,
    WIDTH,
    calibration,
    captured_feedforward,
    chosen_ids,
    inputs,
    moefied,
    naive_sum,
)
from tests.helpers.sweep import sweep

EXACT = 1e-5
SLOW = pytest.mark.slow


def partitioners() -> Iterator[Any]:
    """METIS is tried where it is installed."""
    yield NETWORKX
    yield pytest.param(METIS, marks=pytest.mark.skipif(not _has_metis(), reason="pymetis is not installed"))


def _has_metis() -> bool:
    try:
        import pymetis  # noqa: F401
    except ImportError:
        return False
    return True


def original_neurons(program: Program, parted: Program) -> torch.Tensor:
    """i64[E, S]: which neuron of the dense program each one of an expert is, by its first weights."""
    rows = parted.parameters["up.weight"].reshape(-1, WIDTH)
    dense = program.parameters["up.weight"]
    return torch.tensor([int((dense == row).all(1).nonzero()[0]) for row in rows]).reshape(8, -1)


@pytest.mark.parametrize("partitioner", list(partitioners()))
def test_neurons_that_are_active_together_are_grouped(partitioner: str) -> None:
    blocks = torch.randperm(48, generator=torch.Generator().manual_seed(1)).reshape(6, 8)
    together = torch.full((48, 48), 0.1)
    for block in blocks:
        together[block[:, None], block] = 5.0
    found = coactive_groups(together, 6, 8, partitioner)
    assert {frozenset(group.tolist()) for group in found} == {frozenset(block.tolist()) for block in blocks}


@pytest.mark.parametrize("partitioner", list(partitioners()))
@settings(max_examples=8, deadline=None)
@given(neurons=st.integers(2, 40), count=st.integers(1, 9), seed=st.integers(0, 9), silent=st.booleans())
def test_parts_hold_each_neuron_once_and_none_too_many(
    partitioner: str, neurons: int, count: int, seed: int, silent: bool
) -> None:
    count = min(count, neurons)
    activity = torch.rand(64, neurons, generator=torch.Generator().manual_seed(seed))
    together = activity.T @ activity * (0.0 if silent else 1.0)
    size = -(-neurons // count)
    found = coactive_groups(together, count, size, partitioner, seed)
    assert found.shape == (count, size)
    assert sorted(found[found != EMPTY].tolist()) == list(range(neurons))
    assert torch.equal(found, coactive_groups(together, count, size, partitioner, seed))


@pytest.mark.parametrize(
    "split", [pytest.param("cluster", marks=SLOW), "coactivation", pytest.param("random", marks=SLOW)]
)
def test_shared_experts_hold_what_adds_most_and_every_token_takes_them(split: str) -> None:
    program = captured_feedforward("plain", "relu")
    parted = moefied(program, 8, 3, split=split, shared=1)
    groups = original_neurons(program, parted)
    assert sorted(groups.flatten().tolist()) == list(range(NEURON_COUNT))
    hidden = torch.cat(
        [
            torch.relu(batch["x"] @ program.parameters["up.weight"].T + program.parameters["up.bias"])
            for batch in calibration()
        ]
    )
    added = hidden.flatten(0, -2).sum(0) * program.parameters["down.weight"].norm(dim=0)
    assert set(groups[0].tolist()) == set(added.topk(8).indices.tolist())
    x = inputs(seed=50)
    ids = chosen_ids(parted, x)
    assert bool((ids == 0).any(1).all())
    assert len(ids.unique()) > 3
    assert relative_error(parted(x=x)["output"], naive_sum(parted, x, ids, "plain", "relu")) < 1e-6
    assert ", 3 active, 1 of them for every token; chosen experts" in parted.history[-1].edits[0].what


@pytest.mark.parametrize("router", sweep(["similarity", "oracle", "random"], ["oracle"]))
@pytest.mark.parametrize("labels", [pytest.param("norm", marks=SLOW), "mass"])
def test_every_router_takes_the_shared_experts(router: str, labels: str) -> None:
    program = captured_feedforward("gated", "silu", neurons=61)
    parted = moefied(program, 8, 4, router=router, labels=labels, shared=2)
    ids = chosen_ids(parted, inputs(seed=50))
    assert bool(((ids < 2).sum(1) == 2).all())


def test_labels_are_norms_of_outputs_or_masses_of_activations() -> None:
    """An oracle takes the experts of the largest norms, or masses, by a naive formula."""
    program, x = captured_feedforward("gated", "silu"), inputs(seed=50)
    for labels in ("norm", "mass"):
        parted = moefied(program, 8, 3, router="oracle", labels=labels)
        weight = {name: parted.parameters[f"{name}.weight"] for name in ("gate", "up", "down")}
        bias = parted.parameters["up.bias"]
        gate = torch.nn.functional.silu(torch.einsum("bti,eoi->bteo", x, weight["gate"]))
        hidden = gate * (torch.einsum("bti,eoi->bteo", x, weight["up"]) + bias)
        outputs = torch.einsum("bteo,edo->bted", hidden, weight["down"])
        worth = hidden.abs().sum(-1) if labels == "mass" else outputs.norm(dim=-1)
        best = worth.flatten(0, 1).topk(3).indices
        assert torch.equal(chosen_ids(parted, x).sort().values, best.sort().values)


def test_similarity_needs_no_data_and_compares_with_the_mean_direction() -> None:
    program, x = captured_feedforward("plain", "relu"), inputs(seed=50)
    item = MoEfy(8, 2, router="similarity")
    assert item.resources == ()
    parted = bg.Pipeline([item]).run(program)
    rows = torch.nn.functional.normalize(parted.parameters["up.weight"], dim=2).mean(1)
    wanted = (x.flatten(0, 1) @ rows.T).topk(2).indices
    assert torch.equal(chosen_ids(parted, x).sort().values, wanted.sort().values)
    assert "% of all output" in moefied(program, 8, 2, router="similarity").history[-1].edits[0].what
    padded = centroid_router(torch.eye(3), torch.tensor([[0, 1], [2, EMPTY]]))
    assert torch.equal(padded.weight, torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]))


@SLOW
def test_a_router_of_masses_is_near_its_oracle_and_a_random_split_is_worse() -> None:
    program = captured_feedforward("plain", "relu")
    shares = {}
    for split in ("coactivation", "random"):
        found = moefied(program, split=split, labels="mass").history[-1].edits[0].what
        assert "of all activation mass" in found
        shares[split] = [int(part) for part in re.findall(r"(\d+)%", found)]
    assert shares["coactivation"][1] - shares["coactivation"][0] <= 6
    assert shares["coactivation"][0] > shares["random"][0]


@pytest.mark.parametrize(
    ("router", "shared"),
    sweep([("trained", 0), ("trained", 1), ("oracle", 0), ("oracle", 1)], {("trained", 1)}),
)
def test_experts_below_the_threshold_add_nothing(router: str, shared: int) -> None:
    program, x = captured_feedforward("plain", "relu"), inputs(seed=50)
    parted = moefied(program, 8, 5, router=router, threshold=0.6, shared=shared)
    (best,) = [node for node in parted.graph.nodes if node.target is torch.ops.aten.topk.default]
    found: list[Any] = []
    Observed(parted).run({"x": x}, {best.args[0].name}, lambda _, value: found.append(value.flatten(0, -2)))
    scores = found[0]
    largest = scores[:, shared:].max(1, keepdim=True).values
    kept = (scores >= 0.6 * largest) & (scores >= scores.topk(5).values[:, -1:])
    assert 1 + shared < kept.sum(1).double().mean() < 4.9
    counts = kept.sum(1)
    naive = torch.empty(36, WIDTH)
    for count in counts.unique().tolist():
        rows = counts == count
        ids = kept[rows].nonzero()[:, 1].reshape(-1, count)
        naive[rows] = naive_sum(parted, x.flatten(0, 1)[rows], ids, "plain", "relu")
    assert relative_error(parted(x=x)["output"].flatten(0, 1), naive) < EXACT
    by_mass = moefied(program, 8, 5, router=router, threshold=0.36, labels="mass")
    least = 0.36 if router == "oracle" else 0.6  # a router predicts roots of masses
    products = [node.args for node in by_mass.graph.nodes if node.meta.get("part") == "router"]
    assert any(args[1] == pytest.approx(1 - least) for args in products if len(args) == 2)
    if router == "trained":
        assert re.search(r"above the threshold are \d\.\d of them", parted.history[-1].edits[0].what)


def test_the_mean_number_above_a_threshold_is_counted() -> None:
    scores = torch.tensor([[9.0, 4.0, 2.0, 1.0], [9.0, -1.0, -1.5, -4.0]])
    assert mean_above(scores, 4, 0.5, 1) == (3 + 3) / 2
    assert mean_above(scores, 3, 0.5, 0) == (1 + 1) / 2


@SLOW
def test_deltas_read_no_neurons_below_the_threshold() -> None:
    program = trained(bg.Pipeline([LoRA(r=3, targets=("*",))]).run(captured_feedforward("plain", "relu")))
    x = inputs(seed=50)
    parted = moefied(program, 8, 4, router="oracle", threshold=0.999)
    single = moefied(program, 8, 1, router="oracle")
    assert relative_error(parted(x=x)["output"], single(x=x)["output"]) < EXACT


class TwoLayers(nn.Module):
    """Two feed-forwards, of which the second changes the output a hundred times as much."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.up2, self.down2 = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        with torch.no_grad():
            self.down.weight *= 0.01

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.down(torch.relu(self.up(x)))
        return x + self.down2(torch.relu(self.up2(x)))


def two_layers() -> Program:
    """Always the same weights."""
    torch.manual_seed(0)
    return bg.capture(TwoLayers(), {"x": inputs()})


@SLOW
@pytest.mark.parametrize("router", ["trained", "oracle"])
def test_a_budget_is_spent_where_outputs_drift_most(router: str) -> None:
    item = MoEfy(8, "auto", router=router, average=4)
    parted = bg.Pipeline([item]).run(two_layers(), calibration=calibration(2))
    record = parted.history[-1]
    found = dict(re.findall(r"\[([\w.]+),(\d)\]", record.text))
    assert set(found) == {"up.weight", "up2.weight"}
    assert sum(map(int, found.values())) <= 8
    assert int(found["up2.weight"]) > int(found["up.weight"])
    assert "average" not in record.text
    assert [f"{found[edit.site]} active" in edit.what for edit in record.edits] == [True, True]
    even = bg.Pipeline([MoEfy(8, 4, router=router)]).run(two_layers(), calibration=calibration(2))
    assert record.drift is not None
    assert even.history[-1].drift is not None
    assert record.drift < even.history[-1].drift


def test_a_replay_does_not_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    item = MoEfy(8, "auto", average=3, split="coactivation", shared=1, router="similarity")
    parted = bg.Pipeline([item]).run(two_layers(), calibration=calibration(2))
    assert f"partitioner={METIS if _has_metis() else NETWORKX}" in parted.history[-1].text
    parted.save(tmp_path / "parted")

    def search(*_: object) -> None:
        raise AssertionError("searched")

    monkeypatch.setattr("bmgraph.passes.moefy.moefy.active_within", search)
    again = bg.replay(tmp_path / "parted", two_layers(), calibration=calibration(2))
    assert torch.equal(again(x=inputs(seed=50))["output"], parted(x=inputs(seed=50))["output"])


def test_the_share_lost_falls_to_nothing() -> None:
    worth = torch.tensor([[1.0, 3.0], [4.0, 2.0]])
    assert lost_shares(worth, worth, 1) == pytest.approx({1: 0.3, 2: 0.0})
    assert lost_shares(worth, -worth, 1) == pytest.approx({1: 0.7, 2: 0.0})
    assert lost_shares(torch.zeros(2, 3), torch.rand(2, 3), 2) == {2: 0.0, 3: 0.0}


@SLOW
@pytest.mark.parametrize("order", ["fp32", "int8"])
def test_engines_compute_shared_experts_and_thresholds(order: str) -> None:
    pytest.importorskip("onnxruntime")
    x = inputs(seed=50)
    options: dict[str, Any]
    for options in ({"shared": 1}, {"threshold": 0.6, "shared": 1}):
        passes: list[Any] = [MoEfy(8, 3, **options)]
        if order == "int8":
            passes.append(Quantize("int8", activations="none"))
        program = bg.Pipeline(passes).run(captured_feedforward("plain", "relu"), calibration=calibration())
        engine = bg.compile(program, passes=[], backend="onnx")
        assert relative_error(engine(x=x)["output"], program(x=x)["output"]) < 3e-4


def test_bad_choices_are_refused() -> None:
    for options, message in (
        ({"split": "metis"}, "split='metis': choose one of cluster, coactivation, random"),
        ({"labels": "bce"}, "labels='bce': choose one of norm, mass"),
        ({"shared": 4}, "shared=4: give 0 to 3, fewer than the experts that are active"),
        ({"shared": -1}, "shared=-1: give 0 to 3"),
        ({"threshold": 0.0}, "threshold=0: give a share of the best score, between 0 and 1"),
        ({"threshold": 1.5}, "threshold=1.5: give a share of the best score"),
        ({"threshold": float("nan")}, "threshold=nan: give a share of the best score"),
        ({"threshold": 0.5, "router": "similarity"}, "router='similarity' does not say it: take 'trained'"),
        ({"partitioner": "metis"}, "give split='coactivation' with it"),
        ({"partitioner": "kahip", "split": "coactivation"}, "choose one of metis, networkx"),
        ({"active": "most"}, "active='most': give a number of experts, or 'auto'"),
        ({"active": "auto"}, "give average=, the mean number of active experts"),
        ({"average": 3.0}, "average=3 is a budget to spend: give active='auto' with it"),
        ({"active": "auto", "average": 0.5}, "average=0.5 cannot be met: .*; the nearest is average=1"),
        ({"active": "auto", "average": 40.0}, "average=40 cannot be met: .*; the nearest is average=16"),
        ({"active": "auto", "average": 2.0, "shared": 2}, "a token takes 3 to 16 experts, 2 of them for every"),
        ({"active": (("up.weight", 17),)}, "active=17: give 1 to 16"),
        ({"active": (("up.weight", 2),), "shared": 2}, "shared=2: give 0 to 1"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            MoEfy(**options)  # type: ignore[arg-type]
    with pytest.raises(
        PassError, match=r"2 shared experts take 4 of its 9 neurons, and 6 others do not get one each"
    ):
        moefied(captured_feedforward("plain", "relu", neurons=9), 8, 3, shared=2)
    with pytest.raises(PassError, match=r"active= says nothing of up\.weight: give the number of every"):
        moefied(captured_feedforward(), 8, (("down.weight", 2),))  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"split": "coactivation"}, {"active": "auto", "average": 2.0}])
def test_calibration_that_says_nothing_is_refused(options: dict[str, Any]) -> None:
    item = replace(MoEfy(8, 2), **options)
    program = captured_feedforward()
    broken = {"x": torch.full((4, 9, WIDTH), torch.nan)}
    with pytest.raises(ResourceError, match=r"calibration batch 1 makes the .* NaN.*: repair the batch"):
        bg.Pipeline([item]).run(program, calibration=[calibration(1)[0], broken])
    with pytest.raises(ResourceError, match="'calibration' holds no batch"):
        bg.Pipeline([item]).run(program, calibration=[])


@SLOW
def test_co_activation_is_counted_in_parts_that_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    item = MoEfy(8, 2, split="coactivation", router="oracle")
    whole = bg.Pipeline([item]).run(two_layers(), calibration=calibration(2))
    monkeypatch.setattr("bmgraph.passes.moefy.neuron_statistics.MEMORY", 1)
    parts = bg.Pipeline([item]).run(two_layers(), calibration=calibration(2))
    assert all(torch.equal(value, whole.parameters[name]) for name, value in parts.parameters.items())
