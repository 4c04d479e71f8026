"""The structure finder on small hand-written models: what it finds, what it rejects, and that passes do not change it."""

from __future__ import annotations

import io
import itertools
import sys

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional

import bmgraph as bg
import bmgraph.ops
from bmgraph.analysis.structure.sites import Part, Structure
from bmgraph.analysis.structure.value_origins import stem
from bmgraph.analysis.weight_sites import linears, weight_of
from bmgraph.cli.structure_table import structure_table, structure_tree
from bmgraph.ir.program import Program
from bmgraph.passes import Quantize
from tests.helpers.captured import captured
from tests.helpers.sweep import sweep

WIDTH = 16
HEADS = 4
SIZE = WIDTH // HEADS


class Attention(nn.Module):
    """Attention with four projections. `fused`: one linear for q, k and v; `norms`: on q and k; `kv`: key/value heads."""

    def __init__(
        self, *, fused: bool = False, norms: bool = False, kv: int = HEADS, causal: bool = False
    ) -> None:
        super().__init__()
        self.fused, self.kv, self.causal = fused, kv, causal
        if fused:
            self.all = nn.Linear(WIDTH, WIDTH + 2 * kv * SIZE)
        else:
            self.a, self.b, self.c = (
                nn.Linear(WIDTH, WIDTH),
                nn.Linear(WIDTH, kv * SIZE),
                nn.Linear(WIDTH, kv * SIZE),
            )
        self.out = nn.Linear(WIDTH, WIDTH)
        self.q_norm = nn.RMSNorm(SIZE) if norms else nn.Identity()
        self.k_norm = nn.RMSNorm(SIZE) if norms else nn.Identity()

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        """x [B, S, W], other [B, T, W] or None -> [B, S, W]."""
        other = x if other is None else other
        if self.fused:
            q, k, v = self.all(x).split([WIDTH, self.kv * SIZE, self.kv * SIZE], -1)
        else:
            q, k, v = self.a(x), self.b(other), self.c(other)
        q, k, v = (item.unflatten(-1, (-1, SIZE)).transpose(1, 2) for item in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        k, v = (item.repeat_interleave(HEADS // self.kv, 1) for item in (k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A pre-norm layer."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mix = Attention(causal=causal)
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, W] -> [B, S, W]."""
        x = x + self.mix(self.first(x))
        return x + self.narrow(functional.gelu(self.wide(self.second(x))))


def of(model: nn.Module, *inputs: torch.Tensor) -> Structure:
    """The structure of a model."""
    return bg.capture(model, inputs or (torch.randn(2, 6, WIDTH),), prove=False).structure()


def stacked(layers: int, device: str = "cpu") -> Program:
    """A program of identical layers between a projection and a head."""
    with torch.device(device):
        model = nn.Sequential(
            nn.Linear(8, WIDTH), *(Block() for _ in range(layers)), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)
        )
        return bg.capture(model, (torch.randn(2, 6, 8),), prove=False)


def test_attention_and_its_projections() -> None:
    (found,) = of(Attention()).attentions
    assert (found.q, found.k, found.v) == tuple(Part(f"{name}.weight", ((0, WIDTH),)) for name in "abc")
    assert found.o == "out.weight"
    assert (found.heads, found.kv_heads, found.head_size) == (HEADS, HEADS, SIZE)
    assert (found.causal, found.cross, found.fused) == (False, False, False)


def test_causal_attention() -> None:
    assert of(Attention(causal=True)).attentions[0].causal is True


def test_cross_attention() -> None:
    (found,) = of(Attention(), torch.randn(2, 6, WIDTH), torch.randn(2, 9, WIDTH)).attentions
    assert found.cross


def test_grouped_key_heads_behind_norms() -> None:
    (found,) = of(Attention(norms=True, kv=2)).attentions
    assert (found.heads, found.kv_heads) == (HEADS, 2)
    assert found.k == Part("b.weight", ((0, 2 * SIZE),))


def test_a_fused_projection_is_described_by_ranges_of_its_outputs() -> None:
    structure = of(Attention(fused=True, kv=2))
    (found,) = structure.attentions
    assert found.fused
    assert found.q == Part("all.weight", ((0, 16),))
    assert found.k == Part("all.weight", ((16, 24),))
    assert found.v == Part("all.weight", ((24, 32),))
    assert structure.role("all.weight") == "attention.qkv"


def test_heads_that_interleave_queries_and_keys() -> None:
    class Interleaved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all = nn.Linear(WIDTH, 3 * WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.all(x).unflatten(-1, (HEADS, 3, SIZE)).transpose(1, 2).unbind(-2)
            return functional.scaled_dot_product_attention(q, k, v)

    (found,) = of(Interleaved()).attentions
    assert found.k == Part("all.weight", ((4, 8), (16, 20), (28, 32), (40, 44)))
    assert found.o is None


def test_written_out_attention_that_no_operator_computes() -> None:
    class Capped(Attention):
        def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
            q, k, v = (item(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for item in (self.a, self.b, self.c))
            scores = torch.tanh(q @ k.transpose(-1, -2) / 3)
            hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            weights = scores.masked_fill(hidden, -1e9).softmax(-1)
            return self.out((weights @ v).transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    structure = of(Capped())
    (found,) = structure.attentions
    assert (found.heads, found.head_size, found.causal, found.o) == (HEADS, SIZE, True, "out.weight")
    assert [structure.role(f"{name}.weight") for name in "abc"] == [
        "attention.q",
        "attention.k",
        "attention.v",
    ]


def test_plain_feedforward() -> None:
    structure = of(nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, WIDTH)))
    (found,) = structure.feedforwards
    assert (found.up.linear, found.down, found.gated, found.activation, found.features) == (
        "0.weight", "3.weight", False, "relu", 32,
    )  # fmt: skip


class Gated(nn.Module):
    """down(silu(gate(x)) * up(x)); `fused`: gate and up are one linear."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.both = nn.Linear(WIDTH, 64)
        else:
            self.one, self.two = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32)
        self.last = nn.Linear(32, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, W] -> [B, S, W]."""
        up, gate = self.both(x).chunk(2, -1) if self.fused else (self.one(x), self.two(x))
        return self.last(up * functional.silu(gate))  # type: ignore[no-any-return]


def test_gated_feedforward() -> None:
    (found,) = of(Gated(fused=False)).feedforwards
    assert (found.up.linear, found.gate and found.gate.linear, found.down) == (
        "one.weight",
        "two.weight",
        "last.weight",
    )
    assert found.activation == "silu"


def test_fused_gate_and_up() -> None:
    structure = of(Gated(fused=True))
    (found,) = structure.feedforwards
    assert found.up == Part("both.weight", ((0, 32),))
    assert found.gate == Part("both.weight", ((32, 64),))
    assert structure.role("both.weight") == "feedforward.gate_up"


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, 3)),
        nn.Sequential(nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)),
        nn.Sequential(nn.Linear(WIDTH, 32), nn.Softmax(-1), nn.Linear(32, WIDTH)),
    ],
    ids=["head", "no activation", "softmax"],
)
def test_models_that_are_not_feedforwards(model: nn.Module) -> None:
    structure = of(model)
    assert structure.feedforwards == ()
    assert {item.role for item in structure.linears} == {"linear"}


def test_one_parameter_with_two_uses_is_one_site() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.same(self.same(x))  # type: ignore[no-any-return]

    (site,) = of(Twice()).linears
    assert len(site.uses) == 2


def test_a_tied_head_is_an_embedding_too() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, WIDTH)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return functional.linear(self.table(ids), self.table.weight)

    structure = of(Tied(), torch.randint(0, 9, (2, 6)))
    assert structure.embeddings[0].name == structure.linears[0].name == "table.weight"
    assert structure.role("table.weight") == "embedding"


def test_a_weight_stored_in_out_is_transposed() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(WIDTH, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.matrix

    (site,) = of(Product()).linears
    assert site.transposed
    assert (site.in_features, site.out_features) == (WIDTH, 3)


def test_repeated_layers_are_the_modules() -> None:
    structure = stacked(3).structure()
    (stack,) = structure.stacks
    assert [layer.path for layer in stack.layers] == ["1", "2", "3"]
    assert stack.layers[0].sites[:2] == ("1.first.weight", "1.mix.a.weight")
    assert len(stack.layers[0].sites) == 8


def test_layers_of_another_width_are_no_repetition() -> None:
    widths = (8, 10, 12, 14)
    assert (
        of(nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths))), torch.randn(2, 8)).stacks
        == ()
    )


def wrapped(program: Program) -> Program:
    """The program with every weight behind an expression and every linear's input rounded."""
    changed = program.clone()
    with changed.edit(by="test") as editor:
        scale = editor.parameter("scale", torch.tensor(0.1), frozen=True)
        zero = editor.parameter("zero", torch.tensor(128, dtype=torch.uint8), frozen=True)
        for index, linear in enumerate(linears(changed.graph)):
            weight = weight_of(changed, linear)
            assert weight is not None
            x = linear.args[0]
            assert isinstance(x, torch.fx.Node)
            if index % 2:
                rows = weight.node.meta["val"].shape[weight.channel_axis]
                codes = torch.randint(-127, 127, tuple(weight.node.meta["val"].shape), dtype=torch.int8)
                held = editor.parameter(f"{weight.site}_codes", codes, frozen=True)
                scales = editor.parameter(f"{weight.site}_scales", torch.ones(rows), frozen=True)
                new = editor.call(
                    torch.ops.bmgraph.dequantize.default,
                    held,
                    scales,
                    weight.channel_axis,
                    like=linear,
                    site=weight.site,
                )
                rounded = editor.call(torch.ops.bmgraph.quantize_dynamic.default, x, like=linear)
            else:
                mask = editor.parameter(
                    f"{weight.site}_mask", torch.ones(tuple(weight.node.meta["val"].shape)), frozen=True
                )
                new = editor.call(torch.ops.aten.mul.Tensor, weight.node, mask, like=linear)
                rounded = editor.call(torch.ops.bmgraph.quantize_static.default, x, scale, zero, like=linear)
            if weight.transposed:
                new = editor.call(torch.ops.aten.t.default, new, like=linear)
            linear.update_arg(0, rounded)
            linear.update_arg(1, new)
    return changed


@pytest.mark.parametrize(
    "name", sweep(
        ("bert", "gpt2", "llama", "qwen3", "phi3", "bloom", "t5_gated", "falcon", "modernbert"),
        ("gpt2", "qwen3", "modernbert"),
    ),
)  # fmt: skip
def test_structure_is_the_same_behind_weight_expressions_and_rounded_inputs(name: str) -> None:
    before = captured(name)[1].structure()
    after = wrapped(captured(name)[1]).structure()
    assert all(item.wrapped for item in after.linears)
    assert [(item.name, item.role) for item in after.linears] == [
        (item.name, item.role) for item in before.linears
    ]
    assert after.attentions == before.attentions
    assert after.feedforwards == before.feedforwards
    assert after.stacks == before.stacks
    assert after.roles == before.roles
    dequantised = [item.name for item in before.linears if f"{item.name}_codes" in after.members]
    assert dequantised
    for weight in dequantised:
        assert after.role(f"{weight}_codes") == before.role(weight) != ""


@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
def test_structure_is_the_same_after_quantize(name: str) -> None:
    program = captured(name)[1]
    quantised = bg.Pipeline([Quantize("int8", activations="dynamic", smallest=1)], ()).run(
        program, max_drift=1.0
    )
    before, after = program.structure(), quantised.structure()
    assert any(item.wrapped for item in after.linears)
    assert [(item.name, item.role) for item in after.linears] == [
        (item.name, item.role) for item in before.linears
    ]
    assert after.stacks == before.stacks
    for one, other in zip(before.attentions, after.attentions, strict=True):
        assert (one.q, one.k, one.v, one.o, one.causal) == (other.q, other.k, other.v, other.o, other.causal)


def test_a_program_without_data_has_the_same_structure() -> None:
    real, meta = stacked(2).structure(), stacked(2, device="meta").structure()
    assert meta == real


@pytest.mark.slow
def test_cost_is_linear_in_the_number_of_layers() -> None:
    """Counts function calls, which do not depend on the load of the machine."""

    def calls(layers: int) -> int:
        program = stacked(layers)
        count = 0

        def visit(frame: object, event: str, argument: object) -> None:
            nonlocal count
            count += event == "call"

        sys.setprofile(visit)
        try:
            structure = program.structure()
        finally:
            sys.setprofile(None)
        assert len(structure.layers) == layers
        return count

    assert calls(24) < 1.5 * 4 * calls(6)


def test_tree_and_table_show_the_sites() -> None:
    structure = stacked(2).structure()
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(structure_tree(structure))
    console.print(structure_table(structure))
    text = console.export_text()
    assert "2 x 1" in text
    assert "1.mix.a.weight  attention.q 16 -> 16" in text
    assert "full, 4 heads of 4" in text
    assert "gelu, 32 wide" in text


def test_operators_are_named_by_their_stem() -> None:
    graph = stacked(1).graph
    names = {stem(node) for node in graph.nodes if node.op == "call_function"}
    assert {"linear", "layer_norm", "gelu", "scaled_dot_product_attention"} <= names
