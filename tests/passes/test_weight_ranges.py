"""Several weights in one tensor: each is a site of its own for every pass that changes weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import PassError
from bmgraph.ir.program import Program
from bmgraph.lowering.to_exported_program import deployed
from bmgraph.pass_manager.pass_base import Pass
from bmgraph.passes import LoRA, Merge, Prune, Quantize, Shrink
from bmgraph.verify.metrics import relative_error
from tests.helpers.deltas import trained


class Attend(nn.Module):
    """nn.MultiheadAttention whose queries, and perhaps keys and values, come from different inputs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.kind, self.attend = kind, nn.MultiheadAttention(32, 4, batch_first=True)
        self.last = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x, y = self.embed(x), self.embed(y)
        values = y + 1 if self.kind == "apart" else y
        queries = y if self.kind == "self" else x
        return self.last(self.attend(queries, y, values, need_weights=False)[0])


SITES = {
    "cross": ["attend.in_proj_weight[0:32]", "attend.in_proj_weight[32:96]"],
    "apart": [f"attend.in_proj_weight[{start}:{start + 32}]" for start in (0, 32, 64)],
}


def ids(batch: int, x: int, y: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randint(0, 40, (batch, x)), "y": torch.randint(0, 40, (batch, y))}


def attention(kind: str) -> Program:
    torch.manual_seed(0)
    return bg.capture(Attend(kind).eval(), ids(2, 5, 7))


@pytest.mark.parametrize("kind", SITES)
def test_each_range_is_a_site(kind: str) -> None:
    program = attention(kind)
    assert sorted(item.name for item in program.structure().linears)[:-2] == SITES[kind]
    for item in (Quantize("int8", activations="none"), Quantize("int8", activations="dynamic"), Prune("2:4")):
        found = bg.Pipeline([item]).run(program)
        assert {edit.site for edit in found.history[-1].edits} == {
            *SITES[kind], "attend.out_proj.weight", "last.weight",
        }  # fmt: skip


@pytest.mark.parametrize("kind", SITES)
def test_deltas_sit_on_ranges_and_merge_into_them(kind: str) -> None:
    program = attention(kind)
    tuned = trained(bg.Pipeline([LoRA(r=2, targets=("attend.in_proj_weight",))]).run(program))
    merged = bg.Pipeline([Merge()]).run(tuned)
    assert sorted(merged.parameters) == sorted(program.parameters)
    batch = program.example
    assert relative_error(merged(**batch)["output"], tuned(**batch)["output"]) < 1e-5
    assert relative_error(merged(**batch)["output"], program(**batch)["output"]) > 0.01
    one = bg.Pipeline([LoRA(r=2, roles=("attention.v",))]).run(program)
    assert {edit.site for edit in one.history[-1].edits} == {SITES[kind][-1]}


def test_a_range_that_overlaps_another_is_not_merged_in_place() -> None:
    class Overlap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(24, 16) / 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            low, high = nn.functional.linear(x, self.w[:16]), nn.functional.linear(x, self.w[8:])
            return low.tanh() + high

    program = bg.capture(Overlap(), {"x": torch.randn(3, 16)})
    tuned = trained(bg.Pipeline([LoRA(r=2, targets=("w[[]0:16]",))]).run(program))
    merged = bg.Pipeline([Merge()]).run(tuned)
    batch = program.example
    assert relative_error(merged(**batch)["output"], tuned(**batch)["output"]) < 1e-5
    assert torch.equal(merged.parameters["w"], program.parameters["w"])


@pytest.mark.parametrize("kind", [*SITES, "self"])
def test_heads_shrink(kind: str) -> None:
    program = attention(kind)
    small = bg.Pipeline([Shrink(heads=0.5)]).run(program)
    assert small.parameters["attend.in_proj_weight"].shape == (48, 32)
    assert small(**ids(3, 4, 9))["output"].shape == ((3, 9, 32) if kind == "self" else (3, 4, 32))


def _weight_norm(linear: nn.Linear) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(linear)


class Noisy(nn.Linear):
    """Dropout on the weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, nn.functional.dropout(self.weight, 0.5, self.training), self.bias)


def test_a_computed_weight_is_a_site_and_quantised_as_its_value() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(_weight_norm(nn.Linear(32, 64)), nn.GELU(), nn.Linear(64, 32))
    program = bg.capture(model, {"input": torch.randn(4, 32)})
    site = "0.parametrizations.weight.original1"
    small = bg.Pipeline([Quantize("int8", activations="none")]).run(program)
    assert [edit.site for edit in small.history[-1].edits] == [site, "2.weight"]
    assert not any("original" in name and name.endswith(("0", "1")) for name in small.parameters)
    assert relative_error(small(**program.example)["output"], program(**program.example)["output"]) < 0.02
    tuned = bg.Pipeline([LoRA(r=2, targets=("*",))]).run(program)
    merged = bg.Pipeline([Merge()]).run(tuned)
    assert [item.site for item in merged.history[-1].declined] == [site]


def test_a_scaled_weight_is_not_called_masked() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight * 2, self.bias)

    program = bg.capture(nn.Sequential(Scaled(8, 8), nn.Linear(8, 8)), {"input": torch.randn(4, 8)})
    merged = bg.Pipeline([LoRA(r=2, targets=("*",)), Merge()]).run(program)
    assert [(item.site, item.what) for item in merged.history[-1].declined] == [
        ("0.weight", "its weight is an expression, mul")
    ]


@pytest.mark.parametrize("item", [Quantize("int8", activations="none"), Prune("2:4")])
def test_a_weight_under_dropout_is_declined(item: Pass) -> None:
    model = nn.Sequential(Noisy(32, 64), nn.GELU(), nn.Linear(64, 32))
    program = bg.capture(model, {"input": torch.randn(4, 32)})
    record = bg.Pipeline([item]).run(program).history[-1]
    assert [edit.site for edit in record.edits] == ["2.weight"]
    assert [edit.site for edit in record.declined] == ["0.weight"]


class Rolled(nn.Linear):
    """A weight whose rows move, which no rule follows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.roll(3, 0), self.bias)


@pytest.mark.parametrize("linear", [_weight_norm(nn.Linear(32, 64)), Rolled(32, 64)])
def test_neurons_of_a_computed_weight_are_not_taken_out(linear: nn.Module) -> None:
    model = nn.Sequential(linear, nn.GELU(), nn.Linear(64, 32))
    program = bg.capture(model, {"input": torch.randn(4, 32)})
    with pytest.raises(PassError, match=r"2.weight: operator .* needs all of them"):
        bg.Pipeline([Shrink(ffn=0.5)]).run(program)


@pytest.mark.parametrize("wrap", [_weight_norm, nn.utils.parametrizations.orthogonal])
def test_engines_take_the_value_of_a_computed_weight(wrap: Callable[[nn.Linear], nn.Module]) -> None:
    model = nn.Sequential(wrap(nn.Linear(32, 64)), nn.GELU(), nn.Linear(64, 32))
    program = bg.capture(model, {"input": torch.randn(4, 32)})
    served = deployed(program)
    assert {node.target for node in served.graph.nodes if node.op == "call_function"} == {
        torch.ops.aten.linear.default, torch.ops.aten.gelu.default,
    }  # fmt: skip
    assert relative_error(served(**program.example)["output"], program(**program.example)["output"]) < 1e-6


def test_an_engine_of_quantised_ranges() -> None:
    small = bg.Pipeline([Quantize("int8", activations="none")]).run(attention("cross"))
    engine = bg.compile(small, passes=[], backend="onnx")
    batch = ids(3, 4, 9)
    assert relative_error(torch.as_tensor(engine(**batch)["output"]), small(**batch)["output"]) < 1e-4
