"""A cache that attention appends to in place: ids as without a cache, whatever the rows, the room and the form of the model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import Onnx
from bmgraph.backends.onnx.cache_reads import CAUSAL, prepare_cache_reads
from bmgraph.backends.onnx.rewrites.shared_cache import SINK
from bmgraph.errors import BackendError, BundleError
from bmgraph.ir.program import Program
from bmgraph.lowering.to_exported_program import deployed
from bmgraph.passes import KVCache, Quantize
from bmgraph.runtime.ort import cache_memory, decode_speed, long_steps
from bmgraph.verify.metrics import relative_error
from tests.helpers.bundles import edit_json, sign
from tests.helpers.models import tiny_decoder, tokens
from tests.helpers.rotary_decoder import rotary_decoder

PROMPTS = ([3, 14, 15, 9, 26, 5], [35], [8, 9, 7])

MODELS: dict[str, Any] = {
    "rotary": rotary_decoder,
    "window": lambda: rotary_decoder(window=3),
    "bias": lambda: rotary_decoder(bias=True),
    "learned positions": tiny_decoder,
}


@cache
def program(name: str) -> Program:
    return bg.capture(MODELS[name](), tokens())


@cache
def engine(name: str) -> Any:
    return bg.compile(program(name), backend=Onnx(generate=True, threads=1))


def naive(name: str, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy generation that recomputes the whole text for every token."""
    ids = list(prompt)
    for _ in range(count):
        batch = torch.tensor([ids])
        logits = program(name)(ids=batch, attention_mask=torch.ones_like(batch))["output"]
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def operators(compiled: Any) -> list[str]:
    return [node.op_type for node in ir.load(str(compiled.folder / compiled.files.model)).graph]


@pytest.mark.parametrize(
    "name", ["rotary", *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name != "rotary")]
)
def test_ragged_rows_go_on_as_without_a_cache(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_memory, "FIRST_ROOM", 2)  # the room grows several times
    found = engine(name)
    assert all(slot.in_place for slot in found.cache.slots)
    assert operators(found).count("GroupQueryAttention") == 2
    assert "Attention" not in operators(found)
    assert found.decoder().rows_end_apart == (name != "window")
    assert found.generate(PROMPTS, max_new_tokens=16) == [naive(name, prompt, 16) for prompt in PROMPTS]
    assert found.generate(PROMPTS[0], max_new_tokens=16) == naive(name, PROMPTS[0], 16)


def test_calls_of_a_step_are_few() -> None:
    found = operators(engine("rotary"))
    assert found.count("MatMul") == 2 * 4 + 1  # q|k|v, o, gate|up, down; the head
    assert "RotaryEmbedding" not in found
    assert found.count("Concat") <= 2


def test_attention_has_the_form_that_is_fast_for_one_position_of_each_row() -> None:
    """A scale of 1, which the weights of queries took over, and a sink that takes nothing."""
    compiled = engine("rotary")
    graph = ir.load(str(compiled.folder / compiled.files.model)).graph
    found = [node for node in graph if node.op_type == "GroupQueryAttention"]
    assert [node.attributes.get_float("scale") for node in found] == [1.0, 1.0]
    for node in found:
        sink = node.inputs[11]
        assert sink is not None
        assert sink.const_value is not None
        assert (sink.const_value.numpy() == SINK).all()


def test_a_long_prompt_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [naive("rotary", prompt, 8) for prompt in PROMPTS]
    monkeypatch.setattr(long_steps, "MOST_NEW", 2)
    assert engine("rotary").generate(PROMPTS, max_new_tokens=8) == expected
    assert engine("rotary").generate(PROMPTS[0], max_new_tokens=8) == expected[0]


def test_several_new_positions_behind_cached_ones_are_taken_by_several_rows() -> None:
    """The kernel takes one row of them."""
    cached = bg.Pipeline([KVCache()]).run(program("rotary"))
    batch = cached.example
    assert batch["ids"].shape[0] > 1
    assert batch["ids"].shape[1] > 1
    assert batch["past_key_0"].shape[2] > 1
    expected, found = cached(**batch), engine("rotary")(**batch)
    assert all(relative_error(found[name], expected[name]) < 1e-5 for name in expected)


def test_a_saved_engine_appends_in_place(tmp_path: Path) -> None:
    engine("rotary").save(tmp_path / "out")
    loaded = bg.load(tmp_path / "out", threads=1)
    assert all(slot.in_place for slot in loaded.cache.slots)
    assert loaded.decoder().rows_end_apart
    assert loaded.generate(PROMPTS, max_new_tokens=8) == engine("rotary").generate(PROMPTS, max_new_tokens=8)


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["none", "dynamic"])
def test_int8_products_are_merged(activations: str) -> None:
    passes = [Quantize("int8", activations=activations)]
    compiled = bg.compile(program("rotary"), passes, backend=Onnx(generate=True, threads=1), max_drift=1.0)
    single = bg.compile(
        program("rotary"), passes, backend=Onnx(generate=True, optimise=False, threads=1), max_drift=1.0
    )
    assert compiled.generate(PROMPTS[0], max_new_tokens=8) == single.generate(PROMPTS[0], max_new_tokens=8)


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_products_are_merged_and_the_head_rounds_in_its_kernel(symmetric: bool) -> None:
    """Groups do not divide the width: what rounds by itself would need a reshape that there is none of."""
    torch.manual_seed(0)
    source = bg.capture(rotary_decoder(width=48), tokens())
    passes = [Quantize("int4", group=32, embeddings=8, symmetric=symmetric)]
    compiled, single = (
        bg.compile(source, passes, backend=Onnx(generate=True, optimise=optimise, threads=1), max_drift=3.0)
        for optimise in (True, False)
    )
    model = ir.load(str(compiled.folder / compiled.files.model))
    products = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert len(products) == 2 * 4 + 1
    assert all(node.attributes.get_int("accuracy_level") == 4 for node in products)
    attentions = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    assert [node.attributes.get_float("scale") for node in attentions] == [1.0, 1.0]
    assert all((node.inputs[3] is None) == symmetric for node in products if len(node.inputs) > 3)
    assert compiled.generate(PROMPTS, max_new_tokens=8) == single.generate(PROMPTS, max_new_tokens=8)


class Looking(nn.Module):
    """One attention whose mask is `kind`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed, self.key, self.head = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50)

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        places, x = torch.arange(ids.shape[1]), self.embed(ids)
        mask = (places[None, :] <= places[:, None]) & attention_mask.bool()[:, None, None, :]
        if self.kind == "float":
            mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        if self.kind == "distance":
            distance = (places[:, None] - places[None, :]).abs().float()
            mask = (-0.1 * distance).expand(mask.shape).masked_fill(~mask, -torch.inf)
        heads, keys = (item.unflatten(-1, (2, 8)).transpose(1, 2) for item in (x, self.key(x)))
        mixed = nn.functional.scaled_dot_product_attention(heads, keys, keys, mask)
        logits: torch.Tensor = self.head(mixed.transpose(1, 2).flatten(2))
        return logits


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("bool", "padding"),
        pytest.param("float", "anything", marks=pytest.mark.slow),
        ("distance", "anything"),
    ],
)
def test_what_masks_hide_is_read(kind: str, expected: str) -> None:
    torch.manual_seed(0)
    served = deployed(bg.Pipeline([KVCache()]).run(bg.capture(Looking(kind).eval(), tokens())))
    assert prepare_cache_reads(served) == 1
    (node,) = (item for item in served.graph.nodes if CAUSAL in item.meta)
    assert node.meta[CAUSAL] == f"{expected}:attention_mask"


class Bare(nn.Module):
    """One causal attention, without a mask that a caller gives."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.key, self.head = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        q, k, v = (item.unflatten(-1, (2, 8)).transpose(1, 2) for item in (x, self.key(x), x.sin()))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        logits: torch.Tensor = self.head(mixed.transpose(1, 2).flatten(2))
        return logits


def test_where_no_mask_says_the_length_an_input_of_that_size_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, prompts = Bare().eval(), [[3, 14, 15], [9, 26, 5]]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        expected.append(ids[3:])
    compiled = bg.compile(
        model, example={"ids": tokens()["ids"]}, backend=Onnx(generate=True, threads=1), verify="structure"
    )
    assert all(slot.in_place for slot in compiled.cache.slots)
    assert compiled.generate(prompts, max_new_tokens=8) == expected
    compiled.save(tmp_path / "out")
    assert bg.load(tmp_path / "out", threads=1).generate(prompts, max_new_tokens=8) == expected
    scored = compiled(ids=torch.tensor(prompts))["output"]
    assert relative_error(scored, model(torch.tensor(prompts))) < 1e-5


@pytest.mark.slow
def test_a_manifest_that_claims_room_where_the_model_copies_is_refused(tmp_path: Path) -> None:
    copying = bg.compile(program("rotary"), backend=Onnx(generate=True, optimise=False, threads=1))
    copying.save(tmp_path / "out")

    def claim(manifest: dict[str, Any]) -> None:
        manifest["cache"]["slots"] = [[*slot[:3], "in place"] for slot in manifest["cache"]["slots"]]

    edit_json(tmp_path / "out" / "manifest.json", claim)
    sign(tmp_path / "out")
    with pytest.raises((BackendError, BundleError)):
        bg.load(tmp_path / "out").generate(PROMPTS[0], max_new_tokens=8)


def test_a_token_reads_all_weights_but_the_table_and_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_speed, "READ_BYTES", 2**16)
    found = decode_speed.decode_speed(engine("rotary"), runs=1)
    assert found is not None
    model = rotary_decoder()
    weights = 4 * (sum(item.numel() for item in model.parameters()) - model.embed.weight.numel())
    held = found.prompt_tokens + found.new_tokens // 2
    cache_bytes = 2 * 2 * 4 * 2 * 16 * held  # layers, keys and values, bytes, heads, sizes, positions
    assert (
        abs(found.bytes_per_token - weights - cache_bytes) < 1000
    )  # equal norms are one, and there are constants of sizes
    assert found.share == found.decode * found.bytes_per_token / found.bandwidth
    assert found.as_json()["share_of_bandwidth"] == found.share
