"""Rotate: against folding by hand on an eager model, its matrices, what it declines, and what runs behind it."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import bmgraph as bg
from bmgraph.backends import Torch
from bmgraph.errors import InputError, MisplacedError, OrderError, PassError
from bmgraph.ir.program import Program
from bmgraph.passes import LoadDelta, LoRA, Merge, Prune, Quantize, Rotate, Shrink, Smooth
from bmgraph.passes.rotate.orthogonal import hadamard, has_hadamard, rotation
from bmgraph.utils.stored_tensor import StoredTensor
from bmgraph.verify.metrics import relative_error
from tests.helpers.captured import captured
from tests.helpers.models import tiny_encoder, tokens
from tests.helpers.rotary_decoder import RotaryDecoder
from tests.helpers.sweep import sweep
from tests.helpers.zoo import BY_NAME, text

EXACT = 1e-5


def rotated(program: Program, item: Rotate | None = None, **options: bool) -> Program:
    return bg.Pipeline([item or Rotate()]).run(program, **options)  # type: ignore[arg-type]


def same(found: Program, expected: Program, bound: float = EXACT) -> bool:
    return all(
        relative_error(found(**expected.example)[name], value) < bound
        for name, value in expected(**expected.example).items()
    )


# Matrices


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 130), st.integers(0, 99), st.booleans())
def test_rotations_are_orthogonal_and_keep_the_mean_where_asked(size: int, seed: int, keeps: bool) -> None:
    found, one = rotation(size, seed, keeps), torch.ones(size, dtype=torch.double)
    assert torch.allclose(found @ found.T, torch.eye(size, dtype=torch.double), atol=1e-12)
    assert torch.equal(found, rotation(size, seed, keeps))
    if keeps:
        assert torch.allclose(found @ one, one, atol=1e-12)
        x = torch.randn(3, size, dtype=torch.double)
        norm = nn.functional.layer_norm
        assert torch.allclose(norm(x @ found, (size,)), norm(x, (size,)) @ found, atol=1e-6)


def test_hadamard_matrices_are_those_of_sylvester_and_paley() -> None:
    sizes = [size for size in range(1, 73) if has_hadamard(size)]
    assert sizes == [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 56, 60, 64, 68, 72]
    for size in (*sizes, 384, 576, 896, 960):
        found = hadamard(size)
        assert found is not None
        assert torch.equal(found @ found.T, size * torch.eye(size, dtype=torch.double))
        assert bool((found.abs() == 1).all())
        assert bool((found[:, 0] == 1).all())
    assert hadamard(52) is None


# Against folding by hand


def by_hand(model: Any, seed: int = 0) -> Any:
    """A copy of a Llama whose hidden states and values of heads are rotated, as QuaRot's authors fold it."""
    made, size = copy.deepcopy(model).double(), model.config.head_dim
    turn = rotation(model.config.hidden_size, seed)
    with torch.no_grad():
        made.model.embed_tokens.weight.copy_(made.model.embed_tokens.weight @ turn)
        for number, layer in enumerate(made.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                for linear in readers:
                    linear.weight.copy_(linear.weight * norm.weight @ turn)
                norm.weight.fill_(1)
            for linear in (attention.o_proj, mlp.down_proj):
                linear.weight.copy_(turn.T @ linear.weight)
            inner = rotation(size, seed + 1 + number)
            v, o = attention.v_proj.weight, attention.o_proj.weight
            for head in range(model.config.num_key_value_heads):
                v[head * size : (head + 1) * size] = inner.T @ v[head * size : (head + 1) * size]
            for head in range(model.config.num_attention_heads):
                o[:, head * size : (head + 1) * size] = o[:, head * size : (head + 1) * size] @ inner
        made.lm_head.weight.copy_(made.lm_head.weight * made.model.norm.weight @ turn)
        made.model.norm.weight.fill_(1)
    return made


def test_weights_are_those_folded_by_hand() -> None:
    model, program = captured("llama")
    expected = dict(by_hand(model, 3).named_parameters())
    found = rotated(program, Rotate(seed=3))
    assert found.parameters.keys() == expected.keys()
    for name, value in found.parameters.items():
        assert relative_error(value.double(), expected[name].detach()) < 1e-7, name
    assert str(found).partition("\n")[2] == str(program).partition("\n")[2]  # nothing is added to the graph
    assert found.structure().roles == program.structure().roles
    with torch.no_grad():
        logits = by_hand(model, 3)(**text(2, 12)).logits
    assert relative_error(found(**text(2, 12))["logits"], logits.float()) < EXACT


@cache
def half(dtype: torch.dtype) -> tuple[nn.Module, Program]:
    model = BY_NAME["llama"].build().to(dtype)
    return model, bg.capture(model, text(2, 12))


@pytest.mark.parametrize("dtype", sweep([torch.bfloat16, torch.float16], [torch.bfloat16]))
def test_half_precision_is_folded_in_float64(dtype: torch.dtype) -> None:
    model, program = half(dtype)
    found = rotated(program)
    expected = dict(by_hand(model).named_parameters())
    for name, value in found.parameters.items():
        assert value.dtype is dtype
        assert torch.equal(value, expected[name].detach().to(dtype)), name  # rounded once


# Norms with biases, tied heads, packed and transposed weights


class Packed(nn.Module):
    """Layer norms, q, k and v in one [in, out] weight, linears without biases, and a head that may be the embedding."""

    def __init__(self, tied: bool = True, width: int = 24) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(40, width), nn.Parameter(torch.randn(9, width))
        self.first, self.second, self.last = (nn.LayerNorm(width) for _ in range(3))
        self.qkv = nn.Parameter(torch.randn(width, 3 * width) / 5)
        self.o, self.up, self.down = (
            nn.Linear(width, width),
            nn.Linear(width, 32, bias=False),
            nn.Linear(32, width),
        )
        self.head = nn.Linear(width, 40, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        for norm in (self.first, self.second, self.last):
            nn.init.uniform_(norm.weight, 0.2, 3)
            nn.init.normal_(norm.bias)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.places[: ids.shape[1]]
        q, k, v = (
            part.unflatten(-1, (3, -1)).transpose(1, 2)
            for part in nn.functional.linear(self.first(x), self.qkv.t()).chunk(3, -1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(nn.functional.gelu(self.up(self.second(x))))
        return self.head(self.last(x))


@cache
def packed(tied: bool = True) -> Program:
    torch.manual_seed(0)
    ids = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(1))
    return bg.capture(Packed(tied).eval(), {"ids": ids})


def test_biases_of_norms_become_those_of_linears() -> None:
    program = packed(tied=False)
    found = rotated(program, trains=True)  # gradients are those of the folded weights, too
    assert same(found, program)
    old = program.parameters
    turn = rotation(24, 0, True)
    shift = old["up.weight"].double() @ old["second.bias"].double()
    assert relative_error(found.parameters["up.bias"].double(), shift) < 1e-6
    assert relative_error(found.parameters["places"].double(), old["places"].double() @ turn) < 1e-6
    for norm in ("first", "second", "last"):
        assert bool((found.parameters[f"{norm}.weight"] == 1).all())
        assert not bool(found.parameters[f"{norm}.bias"].any())
    assert [edit.site for edit in found.history[-1].edits] == ["places", "o.weight"]
    assert found.structure().roles.items() >= program.structure().roles.items()


def test_a_tied_head_stays_tied_behind_a_product_or_gets_its_own_weight() -> None:
    program = packed()
    tied, own = rotated(program, trains=True), rotated(program, Rotate(untie=True))
    assert same(tied, program)
    assert same(own, program)
    assert tied.ties == program.ties
    assert not own.ties
    assert "1 product of 24 x 24 added" in tied.history[-1].edits[0].what
    assert (
        sum(value.numel() for value in tied.parameters.values())
        - sum(value.numel() for value in program.parameters.values())
        == 24 * 24 + 24 + 72 + 32
    )  # the matrix with its bias, and the biases of qkv and up
    assert (
        relative_error(
            own.parameters["head.weight"].double(),
            program.parameters["embed.weight"].double()
            * program.parameters["last.weight"].double()
            @ rotation(24, 0, True),
        )
        < 1e-6
    )


class Shared(nn.Module):
    """Layers of RMS norms over widths that have no Hadamard matrix, the second of which reads the first one's weights again."""

    def __init__(self, width: int, norm: type[nn.Module], bias: bool, again: bool) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, width, bias=bias), nn.Linear(width, 5, bias=bias)
        self.norms = nn.ModuleList(norm(width) for _ in range(3))
        self.ups = nn.ModuleList(nn.Linear(width, 10, bias=bias) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(10, width, bias=bias) for _ in range(2))
        if again:
            self.ups[1], self.downs[1], self.norms[1] = self.ups[0], self.downs[0], self.norms[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for norm, up, down in zip(self.norms, self.ups, self.downs):
            x = x + 0.5 * down(torch.tanh(up(norm(x))))
        found: torch.Tensor = self.leave(self.norms[2](x))
        return found


@settings(max_examples=5, deadline=None)
@given(
    st.integers(2, 24),
    st.sampled_from([nn.RMSNorm, nn.LayerNorm]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 9),
)
def test_outputs_stay_and_hidden_states_turn(
    width: int, norm: type[nn.Module], bias: bool, again: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    model = Shared(width, norm, bias, again).eval()
    for item in model.norms.parameters():
        nn.init.uniform_(item, 0.3, 2)
    program = bg.capture(model, {"x": torch.randn(4, 6)}, prove=False)
    found = rotated(program, Rotate(seed=seed))
    assert same(found, program)
    old, new = (item.parameters["enter.weight"].double() for item in (program, found))
    assert torch.allclose(old.T @ old, new.T @ new, atol=1e-5)
    assert width < 3 or not torch.allclose(old, new, atol=1e-3)


def test_weights_that_are_read_twice_get_one_bias() -> None:
    torch.manual_seed(0)
    model = Shared(8, nn.LayerNorm, False, True).eval()
    for item in model.norms.parameters():
        nn.init.uniform_(item, 0.3, 2)
    program = bg.capture(model, {"x": torch.randn(4, 6)}, prove=False)
    found = rotated(program)
    assert same(found, program)
    assert set(found.parameters) - set(program.parameters) == {"ups.0.bias", "leave.bias"}


class Scaled(nn.Module):
    """Layers whose outputs are scaled channel by channel (LayerScale), on an input that is no parameter and a returned hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.scale, self.last = nn.Parameter(torch.rand(16) + 0.1), nn.Linear(16, 16)
        self.enter = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.enter(x) + torch.arange(16.0) / 16
        h = h + self.down(torch.tanh(self.up(self.norm(h)))) * self.scale
        return {"hidden": h, "out": self.last(h)}


def test_factors_of_channels_move_into_writers_and_whole_values_come_by_products() -> None:
    torch.manual_seed(0)
    program = bg.capture(Scaled().eval(), {"x": torch.randn(5, 16)})
    found = rotated(program, trains=True)
    assert same(found, program)
    assert bool((found.parameters["scale"] == 1).all())
    assert "2 products of 16 x 16 added" in found.history[-1].edits[0].what


def test_weights_in_files_are_folded(tmp_path: Path) -> None:
    model, program = captured("llama")
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    stored = bg.capture(copy.deepcopy(model).to("meta"), text(2, 12), weights=tmp_path)
    assert isinstance(stored.parameters["lm_head.weight"], StoredTensor)
    found, expected = rotated(stored), rotated(program)
    for name, value in found.parameters.items():
        assert torch.equal(value, expected.parameters[name]), name


# What stays as it is


def test_hidden_states_between_norms_stay_and_values_of_heads_turn() -> None:
    program = bg.capture(tiny_encoder(), tokens())
    found = rotated(program)
    (declined,) = found.history[-1].declined
    assert (
        "norms with weights are within it, between layers (post-norm): blocks.0.first.weight" in declined.what
    )
    assert [edit.site for edit in found.history[-1].edits] == ["blocks.0.o.weight", "blocks.1.o.weight"]
    for name in ("embed.weight", "blocks.0.q.weight", "blocks.0.up.weight"):
        assert found.parameters[name] is program.parameters[name]
    assert same(found, program)


def test_what_is_not_linear_in_hidden_states_is_told() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.RMSNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
            self.enter = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.enter(x)
            x = x + self.down(self.up(self.norm(x)).relu())
            return x * torch.sigmoid(x)

    program = bg.capture(Gated(), {"x": torch.randn(3, 8)})
    with pytest.raises(PassError, match=r"operator silu reads it, and a rotation does not pass through it"):
        rotated(program)


def test_weights_that_passes_changed_are_left_or_refused_with_an_order() -> None:
    program = packed(tied=False)
    with pytest.raises(
        OrderError, match=r"masked: rotate before Prune.*try this order: passes=\[rotate, prune\]"
    ):
        bg.Pipeline([Prune(), Rotate()]).run(program)
    with pytest.raises(OrderError, match=r"try this order: passes=\[rotate, quantize"):
        bg.Pipeline([Quantize("int4", group=16), Rotate()]).run(program)
    done = bg.Pipeline([LoRA(r=2, targets=("o", "up")), Rotate(values=False)]).run(program)
    assert same(done, program)  # matrices of deltas are linears, too
    assert rotated(rotated(program)).history[-1].edits[0].site == "places"


def test_a_delta_of_the_weights_before_is_refused(tmp_path: Path) -> None:
    program = packed(tied=False)
    bg.Pipeline([LoRA(r=2, targets=("up",))]).run(program).save_delta(str(tmp_path))
    with pytest.raises(MisplacedError, match="another backbone"):
        bg.Pipeline([LoadDelta()]).run(rotated(program), resources={"delta": str(tmp_path)})


def test_bad_options_and_programs_without_weights_are_refused() -> None:
    with pytest.raises(InputError, match="nothing is left to rotate"):
        Rotate(stream=False, values=False)
    with pytest.raises(InputError, match="untie=True with stream=False"):
        Rotate(stream=False, untie=True)
    with pytest.raises(PassError, match="load its weights first"):
        rotated(packed().to("meta"))
    with pytest.raises(PassError, match="changed nothing"):
        rotated(bg.capture(nn.Linear(4, 3), {"input": torch.randn(2, 4)}))


# What comes behind it


def test_it_runs_in_front_of_what_compresses_and_is_replayed_to_equal_bits(tmp_path: Path) -> None:
    program = packed(tied=False)
    passes = [
        LoRA(r=2, targets=("up",)),
        Merge(),
        Rotate(),
        Smooth(),
        Shrink(ffn=0.25),
        Prune(),
        Quantize("int8"),
    ]
    done = bg.Pipeline(passes).run(program, calibration=[program.example], max_drift=2.0)
    done.save(str(tmp_path / "done"))
    again = bg.replay(tmp_path / "done", program, calibration=[program.example])
    for name, value in done.parameters.items():
        assert torch.equal(value, again.parameters[name]), name


def test_quantize_rotates_first_and_once() -> None:
    program = packed()
    item = Quantize("int4", group=16, smallest=8, rotate=True, embeddings=8)
    for passes in ([item], [Rotate(untie=True), item]):
        texts = [record.text for record in bg.Pipeline(passes).run(program, max_drift=1.0).history]
        assert texts[0] == "rotate{untie=true}"
        assert len(texts) == 2


def test_channels_that_are_far_larger_than_others_round_better() -> None:
    torch.manual_seed(0)
    model = RotaryDecoder(width=64).eval()
    with torch.no_grad():
        model.embed.weight[:, 5] *= 200.0
        for layer in model.layers:
            layer.second.weight[9] = 30.0
    example = tokens()
    program = bg.capture(model, example)
    drift = {}
    for rotate in (False, True):
        item = Quantize("int8", activations="dynamic", outliers=False, rotate=rotate)
        record = bg.Pipeline([item]).run(program, calibration=[example], max_drift=2.0).history[-1]
        drift[rotate] = record.drift or 0.0
    assert drift[True] < 0.7 * drift[False]


@pytest.mark.slow
def test_ids_that_are_generated_stay() -> None:
    torch.manual_seed(0)
    program = bg.capture(RotaryDecoder().eval(), tokens())
    prompts = [[3, 7, 9], [4, 4, 8, 1, 20]]
    plain, turned = (
        bg.compile(item, backend=Torch(generate=True)).generate(prompts, max_new_tokens=8)
        for item in (program, rotated(program))
    )
    assert plain == turned
