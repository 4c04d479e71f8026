"""Prune by other patterns and scores: masks and updates against naive forms, on any architecture, with what they gain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bmgraph as bg
from bmgraph.errors import InputError, PassError, ResourceError, VerificationError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.layer_sites import DAMPING
from bmgraph.pass_manager.pass_base import ModelPass
from bmgraph.passes import LoRA, Prune, Quantize
from bmgraph.passes.prune import prune as module
from bmgraph.passes.prune.patterns import lowest_of_all, lowest_share, sparsity_mask, transposable_mask
from bmgraph.passes.prune.sparsegpt import sparsegpt
from tests.helpers.captured import batches, captured
from tests.helpers.deltas import Stored
from tests.helpers.zoo import BY_NAME

SEED = torch.Generator().manual_seed(0)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(2, 8), st.integers(1, 7), st.integers(0, 1000))
def test_patterns_keep_the_highest_of_every_group(rows: int, size: int, kept: int, seed: int) -> None:
    kept = min(kept, size - 1)
    scores = torch.rand(rows, 3 * size, generator=torch.Generator().manual_seed(seed))
    mask = sparsity_mask(scores, kept, size)
    for row, chosen in zip(scores.reshape(-1, size), mask.reshape(-1, size)):
        assert sorted(row[chosen].tolist()) == sorted(row.tolist())[size - kept :]


def test_a_transposable_mask_is_the_best_of_all() -> None:
    scores = torch.rand(8, 12, generator=SEED)
    mask = transposable_mask(scores, 2, 4)
    squares = (torch.arange(2**16)[:, None] >> torch.arange(16) & 1).reshape(-1, 4, 4)
    legal = squares[(squares.sum(1) == 2).all(-1) & (squares.sum(2) == 2).all(-1)]
    assert len(legal) == 90
    for row in range(0, 8, 4):
        for column in range(0, 12, 4):
            block, chosen = (item[row : row + 4, column : column + 4] for item in (scores, mask))
            assert float((block * chosen).sum()) == pytest.approx(
                max(float((block * one).sum()) for one in legal)
            )


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 0.99), st.integers(0, 1000))
def test_a_share_drops_the_lowest(share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    given_scores = {name: torch.rand(3, size, generator=generator) for name, size in (("a", 7), ("b", 11))}
    together = lowest_of_all(given_scores, share)
    flat = torch.cat([item.reshape(-1) for item in given_scores.values()])
    kept = torch.cat([item.reshape(-1) for item in together.values()])
    assert int((~kept).sum()) == round(share * len(flat))
    if kept.any() and not kept.all():
        assert flat[kept].min() >= flat[~kept].max()
    rows = lowest_share(given_scores["b"], share, True)
    assert (~rows).sum(1).tolist() == [round(share * 11)] * 3


def naive_sparsegpt(weight: torch.Tensor, second: torch.Tensor, kept: int, size: int) -> torch.Tensor:
    """Optimal brain surgeon, column by column: the inverse of what is left is computed anew each time."""
    count = weight.shape[1]
    damped = second + DAMPING * second.diagonal().mean() * torch.eye(count, dtype=torch.float64)
    left, mask = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    for column in range(count):
        inverses = [
            torch.linalg.inv(damped[at:, at:])[0, 0] for at in range(column, min(column + size, count))
        ]
        if column % size == 0:
            costs = left[:, column : column + size].square() / torch.stack(inverses)
            mask[:, column : column + size] = sparsity_mask(costs, kept, size)
        inverse = torch.linalg.inv(damped[column:, column:])
        dropped = torch.where(mask[:, column], 0.0, left[:, column])
        left[:, column:] -= dropped[:, None] / inverse[0, 0] * inverse[0]
    return left * mask


@pytest.mark.parametrize(("kept", "size"), [(2, 4), (1, 4), (2, 5)])
def test_sparsegpt_is_the_naive_form(kept: int, size: int) -> None:
    """Over more columns than a block has."""
    columns = 160
    weight = torch.randn(6, columns, dtype=torch.float64, generator=SEED)
    x = torch.randn(300, columns, dtype=torch.float64, generator=SEED) @ torch.randn(
        columns, columns, dtype=torch.float64, generator=SEED
    )
    second = x.T @ x
    found, mask = sparsegpt(weight, second, lambda scores: sparsity_mask(scores, kept, size), size)
    expected = naive_sparsegpt(weight, second, kept, size)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    assert bool((found[~mask] == 0).all())
    plain = weight * sparsity_mask(weight.abs(), kept, size)
    errors = [float((x @ (item - weight).T).norm()) for item in (found, plain)]
    assert errors[0] < 0.9 * errors[1]


class Skewed(nn.Module):
    """Layers whose inputs have very different sizes, one of which is always zero, and a weight that two products read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.register_buffer("sizes", torch.logspace(-2, 1, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x f[B, 16] -> f[B, 16]."""
        x = x * self.sizes * (torch.arange(16) != 3)
        for layer in self.layers:
            x = torch.tanh(layer(x)) * self.sizes
        return self.layers[0](x)


def rows(count: int = 200) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(count, 16, generator=torch.Generator().manual_seed(1))}


def test_wanda_is_the_formula_layer_by_layer() -> None:
    """A layer's inputs are those that the layers before it give, pruned."""
    model = Skewed()
    program = bg.capture(model, rows(4))
    pruned = bg.Pipeline([Prune("unstructured", "wanda", sparsity=0.25)]).run(
        program, calibration=[rows()], max_drift=2
    )
    assert pruned.parameters["layers.1.weight_mask"].sum(1).tolist() == [12] * 16
    x = rows()["x"] * model.sizes * (torch.arange(16) != 3)
    first = pruned.parameters["layers.0.weight"] * pruned.parameters["layers.0.weight_mask"]
    x = torch.tanh(nn.functional.linear(x, first, model.layers[0].bias)) * model.sizes
    scores = model.layers[1].weight.abs() * x.norm(dim=0)
    assert torch.equal(pruned.parameters["layers.1.weight_mask"], lowest_share(scores, 0.25, True))
    assert torch.equal(pruned.parameters["layers.1.weight"], model.layers[1].weight)


CALIBRATED = [
    Prune("2:4", "wanda"), Prune("2:4", "sparsegpt"), Prune("unstructured", "wanda"), Prune("unstructured", "sparsegpt"),
    Prune("2:4", "wanda", transposable=True), Prune("1:4", "sparsegpt"), Prune("4:8", "sparsegpt"),
]  # fmt: skip


def error(program: Program, item: ModelPass, calibration: dict[str, torch.Tensor]) -> float:
    pruned = bg.Pipeline([item]).run(program, calibration=[calibration], max_drift=5)
    test = {"x": torch.randn(64, 16, generator=torch.Generator().manual_seed(2))}
    before, after = (one(**test)["output"] for one in (program, pruned))
    return float((after - before).norm() / before.norm())


def test_calibrated_scores_lose_less() -> None:
    program = bg.capture(Skewed(), rows(4))
    for pattern in ("2:4", "unstructured"):
        errors = [
            error(program, Prune(pattern, score), rows()) for score in ("magnitude", "wanda", "sparsegpt")
        ]
        assert max(errors[1:]) < 0.85 * errors[0], (pattern, errors)


@pytest.mark.parametrize("item", CALIBRATED, ids=str)
def test_stored_the_other_way(item: ModelPass) -> None:
    """A weight [in, out] is pruned along its inputs."""
    program = bg.capture(Stored(), {"x": torch.randn(3, 16, generator=SEED)})
    pruned = bg.Pipeline([item]).run(
        program, calibration=[{"x": torch.randn(99, 16, generator=SEED)}], max_drift=2
    )
    mask = pruned.parameters["w_mask"]
    assert mask.shape == program.parameters["w"].shape
    assert 0.4 < 1 - float(mask.float().mean()) < 0.8


def test_magnitude_takes_any_pattern() -> None:
    program = bg.capture(Skewed(), rows(4))
    for item in (Prune("1:4"), Prune("7:8"), Prune("2:4", transposable=True)):
        pruned = bg.Pipeline([item]).run(program, max_drift=5)
        kept, size = map(int, item.pattern.split(":"))
        mask = pruned.parameters["layers.1.weight_mask"]
        assert mask.reshape(16, -1, size).sum(-1).unique().tolist() == [kept]
        if item.transposable:
            assert mask.T.reshape(16, -1, size).sum(-1).unique().tolist() == [kept]
    for scope, share in (("row", 0.5), ("layer", 0.3), ("global", 0.6)):
        pruned = bg.Pipeline([Prune("unstructured", sparsity=share, scope=scope)]).run(program, max_drift=5)
        masks = [pruned.parameters[f"layers.{index}.weight_mask"] for index in range(3)]
        assert sum(int((~mask).sum()) for mask in masks) == pytest.approx(share * 3 * 256, abs=2)


def test_what_cannot_be_pruned_is_declined() -> None:
    program = bg.capture(Skewed(), rows(4))
    codes = bg.Pipeline([Quantize("int8", activations="none", smallest=1)]).run(program)
    with pytest.raises(PassError, match="prune before that pass"):
        bg.Pipeline([Prune(score="sparsegpt")]).run(codes, calibration=[rows()])
    bg.Pipeline([Prune(score="wanda")]).run(codes, calibration=[rows()], max_drift=2)
    with pytest.raises(PassError, match="wanda measures, and a program on the meta device has no values"):
        bg.Pipeline([Prune(score="wanda")]).run(program.to("meta"), calibration=[rows()])
    with pytest.raises(ResourceError, match="calibration"):
        bg.Pipeline([Prune(score="wanda")]).run(program)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.0}, r"sparsity=0\.0: give the share"),
        ({"sparsity": 1.0}, r"sparsity=1\.0"),
        ({"scope": "row"}, "scope='row': for pattern='unstructured'"),
        ({"pattern": "unstructured", "scope": "model"}, "choose one of row, layer, global"),
        (
            {"pattern": "unstructured", "scope": "global", "score": "wanda"},
            "scope='global' is for score='magnitude'",
        ),
        ({"pattern": "unstructured", "scope": "row", "score": "sparsegpt"}, "leave scope out"),
        ({"pattern": "4:8", "transposable": True}, "transposable: give a pattern N:M with M up to 4"),
        ({"score": "sparsegpt", "transposable": True}, "magnitude or wanda as score"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Prune(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("item", "message"), [
    (Prune("unstructured", sparsity=0.5), "keeps more than 0.5 of its weights"),
    (Prune("unstructured", sparsity=0.5, scope="global"), "the model: it drops weights of higher magnitude"),
    (Prune("2:4", transposable=True), "keeps more than 2 weights of a group of 4"),
])  # fmt: skip
def test_wrong_masks_are_stopped(item: Prune, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = bg.capture(Skewed(), rows(4))
    monkeypatch.setattr(
        module, "lowest_share", lambda scores, share, by_row: lowest_share(scores, share / 2, by_row)
    )
    monkeypatch.setattr(
        module,
        "lowest_of_all",
        lambda scores, share: lowest_of_all({k: -v for k, v in scores.items()}, share),
    )
    monkeypatch.setattr(module, "transposable_mask", sparsity_mask)
    with pytest.raises(VerificationError, match=message):
        bg.Pipeline([item]).run(program, max_drift=5)


def test_a_pruned_model_replays(tmp_path: Path) -> None:
    """To the same bits, with a delta behind."""
    program = bg.capture(Skewed(), rows(4))
    item = Prune("2:4", "sparsegpt")
    pruned = bg.Pipeline([item, LoRA(r=2, targets="all-linear")]).run(
        program, calibration=[rows()], max_drift=5
    )
    pruned.save(tmp_path / "out")
    again = bg.replay(tmp_path / "out", Skewed(), calibration=[rows()])
    for name, value in pruned.parameters.items():
        assert torch.equal(again.parameters[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("item", CALIBRATED[:4], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "mixtral", "mamba"])
def test_architectures(name: str, item: ModelPass) -> None:
    _, program = captured(name)
    pruned = bg.Pipeline([item]).run(program, calibration=batches(BY_NAME[name]), max_drift=5)
    assert len(pruned.history[-1].edits) > 3
