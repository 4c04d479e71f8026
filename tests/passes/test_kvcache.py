"""KVCache: golden graph, values against the program without a cache, refused programs, and sites found afterwards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import InputError, OrderError, PassError
from bmgraph.ir.program import Program
from bmgraph.lowering.to_exported_program import deployed
from bmgraph.passes import KVCache
from bmgraph.passes.kvcache.equivalence import Reader, spec_of
from bmgraph.passes.kvcache.sequence_roles import find_sequence_roles
from bmgraph.verify.metrics import relative_error
from tests.helpers.deltas import replay_in_a_fresh_process
from tests.helpers.models import TinyDecoder, tiny_decoder, tokens

WIDTH, HEADS, VOCABULARY = 8, 2, 12


class OneAttention(nn.Module):
    """The smallest decoder: ids, learned positions, one attention, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(16, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length = ids.shape
        places = torch.arange(length)
        x = self.embed(ids) + self.places(places)
        q, k, v = (y.view(batch, length, HEADS, -1).transpose(1, 2) for y in (x, self.k(x), self.v(x)))
        seen = (places[None] <= places[:, None]) & mask.bool()[:, None, None, :]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, seen)
        scores: torch.Tensor = mixed.transpose(1, 2).reshape(batch, length, WIDTH) @ self.embed.weight.T
        return scores


def small() -> Program:
    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (2, 6))
    return bg.capture(OneAttention(), {"ids": ids, "mask": torch.ones_like(ids)})


@pytest.fixture(scope="module")
def decoder() -> Program:
    return bg.capture(tiny_decoder(), tokens())


@pytest.fixture(scope="module")
def cached(decoder: Program) -> Program:
    return bg.Pipeline([KVCache()]).run(decoder)


def test_the_rewritten_graph_is_golden() -> None:
    total, ours, end = "past + sequence", "  # part=cache pass=kvcache", 2**63 - 1
    assert str(bg.Pipeline([KVCache()]).run(small())) == (
        f"forward(ids: i64[batch, sequence], mask: i64[batch, {total}], past_key_0: f32[batch, 2, past, 4], "
        "past_value_0: f32[batch, 2, past, 4], scored_positions: i64[scored]):\n"
        f"  %sym_size = aten.sym_size.int(%ids, 1) : sequence{ours}\n"
        f"  %sym_size_1 = aten.sym_size.int(%past_key_0, 2) : past{ours}\n"
        f"  %add = operator.add(%sym_size_1, %sym_size) : {total}{ours}\n"
        f"  %arange = aten.arange(%add) : i64[{total}]\n"
        "  %embedding = aten.embedding(embed.weight, %ids) : f32[batch, sequence, 8]\n"
        f"  %to = aten.to.dtype(%mask, int64) : i64[batch, {total}]{ours}\n"
        f"  %cumsum = aten.cumsum(%to, 1) : i64[batch, {total}]{ours}\n"
        f"  %sub = aten.sub.Tensor(%cumsum, 1) : i64[batch, {total}]{ours}\n"
        f"  %slice = aten.slice.Tensor(%sub, 1, %sym_size_1, {end}) : i64[batch, sequence]{ours}\n"
        f"  %clamp = aten.clamp(%slice, 0) : i64[batch, sequence]{ours}\n"
        "  %embedding_1 = aten.embedding(places.weight, %clamp) : f32[batch, sequence, 8]\n"
        "  %add_1 = aten.add.Tensor(%embedding, %embedding_1) : f32[batch, sequence, 8]\n"
        "  %linear = aten.linear(%add_1, k.weight) : f32[batch, sequence, 8]\n"
        "  %linear_1 = aten.linear(%add_1, v.weight) : f32[batch, sequence, 8]\n"
        f"  %sym_size_2 = aten.sym_size.int(%ids, 0) : batch{ours}\n"
        "  %reshape = aten.reshape(%add_1, [%sym_size_2, %sym_size, 2, -1]) : f32[batch, sequence, 2, 4]\n"
        "  %transpose = aten.transpose.int(%reshape, 1, 2) : f32[batch, 2, sequence, 4]\n"
        "  %reshape_1 = aten.reshape(%linear, [%sym_size_2, %sym_size, 2, -1]) : f32[batch, sequence, 2, 4]\n"
        "  %transpose_1 = aten.transpose.int(%reshape_1, 1, 2) : f32[batch, 2, sequence, 4]\n"
        f"  %cat = aten.cat([%past_key_0, %transpose_1], 2) : f32[batch, 2, {total}, 4]{ours}\n"
        "  %reshape_2 = aten.reshape(%linear_1, [%sym_size_2, %sym_size, 2, -1]) : f32[batch, sequence, 2, 4]\n"
        "  %transpose_2 = aten.transpose.int(%reshape_2, 1, 2) : f32[batch, 2, sequence, 4]\n"
        f"  %cat_1 = aten.cat([%past_value_0, %transpose_2], 2) : f32[batch, 2, {total}, 4]{ours}\n"
        f"  %unsqueeze = aten.unsqueeze(%arange, 0) : i64[1, {total}]\n"
        f"  %to_1 = aten.to.dtype(%mask, bool) : bool[batch, {total}]\n"
        f"  %unsqueeze_1 = aten.unsqueeze(%to_1, 1) : bool[batch, 1, {total}]\n"
        f"  %unsqueeze_2 = aten.unsqueeze(%unsqueeze_1, 2) : bool[batch, 1, 1, {total}]\n"
        f"  %slice_1 = aten.slice.Tensor(%arange, 0, %sym_size_1, {end}) : i64[sequence]{ours}\n"
        "  %unsqueeze_3 = aten.unsqueeze(%slice_1, 1) : i64[sequence, 1]\n"
        f"  %le = aten.le.Tensor(%unsqueeze, %unsqueeze_3) : bool[sequence, {total}]\n"
        f"  %__and__ = aten.__and__.Tensor(%le, %unsqueeze_2) : bool[batch, 1, sequence, {total}]\n"
        "  %scaled_dot_product_attention = aten.scaled_dot_product_attention(%transpose, %cat, %cat_1, %__and__) : f32[batch, 2, sequence, 4]\n"
        "  %transpose_3 = aten.transpose.int(%scaled_dot_product_attention, 1, 2) : f32[batch, sequence, 2, 4]\n"
        "  %reshape_3 = aten.reshape(%transpose_3, [%sym_size_2, %sym_size, 8]) : f32[batch, sequence, 8]\n"
        f"  %index_select = aten.index_select(%reshape_3, 1, %scored_positions) : f32[batch, scored, 8]{ours}\n"
        "  %linear_2 = aten.linear(%index_select, embed.weight) : f32[batch, scored, 12]\n"
        "  return output=%linear_2, present_key_0=%cat, present_value_0=%cat_1\n"
    )


def test_tokens_one_by_one_equal_the_whole_text(decoder: Program, cached: Program) -> None:
    batch = tokens(3, 12)
    batch["attention_mask"] = torch.ones_like(batch["ids"])
    expected = decoder(**batch)["output"]
    reader = Reader(cached, spec_of(cached), {})
    for place in range(12):
        found = reader.read(batch["ids"][:, place : place + 1], 0)
        assert relative_error(found[:, 0], expected[:, place]) < 1e-5


def test_padding_in_front_changes_nothing(decoder: Program, cached: Program) -> None:
    ids = tokens(1, 9)["ids"]
    expected = decoder(ids=ids, attention_mask=torch.ones_like(ids))["output"][:, -1]
    found = Reader(cached, spec_of(cached), {}).read(ids, 5)
    assert relative_error(found[:, 0], expected) < 1e-5


def test_the_signature_says_all(cached: Program) -> None:
    spec = spec_of(cached)
    assert (spec.tokens.name, spec.mask and spec.mask.name, spec.positions) == ("ids", "attention_mask", None)
    assert [slot.past.name for slot in spec.slots] == [
        "past_key_0",
        "past_value_0",
        "past_key_1",
        "past_value_1",
    ]
    assert (spec.vocabulary, spec.limit) == (50, 40)
    assert spec.logits.shape == ("batch", "scored", 50)


def test_too_many_positions_and_wrong_pasts_are_refused(cached: Program) -> None:
    batch = dict(cached.example)
    longer = {**batch, "attention_mask": torch.ones(3, 41, dtype=torch.int64)}
    with pytest.raises(InputError, match=r"has past \+ sequence 41 at dimension 1: this model takes 1 to 40"):
        cached(**longer)
    with pytest.raises(InputError, match=r"has size 9 at dimension 1: expected past \+ sequence = 8"):
        cached(**{**batch, "attention_mask": torch.ones(3, 9, dtype=torch.int64)})


def test_roles_and_sites_stay(decoder: Program, cached: Program) -> None:
    before, after = decoder.structure(), cached.structure()
    assert after.roles == before.roles
    assert [site.causal for site in after.attentions] == [True, True]


@pytest.mark.slow
def test_saved_loaded_and_replayed(cached: Program, tmp_path: Path) -> None:
    cached.save(tmp_path / "prog")
    loaded = bg.load(tmp_path / "prog")
    assert str(loaded) == str(cached)
    for name, value in cached(**cached.example).items():
        assert relative_error(loaded(**cached.example)[name], value) < 1e-6
    again = bg.replay(tmp_path / "prog", bg.capture(tiny_decoder(), tokens()))
    assert str(again) == str(cached)
    replay_in_a_fresh_process(
        tmp_path / "prog",
        "from tests.helpers.models import tiny_decoder, tokens",
        "bg.capture(tiny_decoder(), tokens())",
    )


def test_it_runs_once(cached: Program) -> None:
    with pytest.raises(OrderError, match="cannot run on a program that is cached"):
        bg.Pipeline([KVCache()]).run(cached)


def lower(ids: torch.Tensor) -> torch.Tensor:
    places = torch.arange(ids.shape[1])
    return places[None, :] <= places[:, None]


class Shifted(TinyDecoder):
    """Tokens mix outside attention too: each adds a value of the previous one."""

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + torch.cat([x[:, :1], x[:, :-1]], 1)
        for block in self.blocks:
            x = block(x, lower(ids) & attention_mask.bool()[:, None, None, :])
        logits: torch.Tensor = self.head(x)
        return logits


class Encoder(TinyDecoder):
    """Attention without a causal mask."""

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, attention_mask.bool()[:, None, None, :])
        logits: torch.Tensor = self.head(x)
        return logits


class Headless(TinyDecoder):
    """Returns only hidden states."""

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x, lower(ids))
        return x


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Shifted, "its tokens interact outside causal attention"),
        (Encoder, "its tokens interact outside causal attention"),
        (Headless, "no output scores the vocabulary"),
        (
            partial(Headless, longest=32),
            "no output scores the vocabulary",
        ),  # a position table as long as the model is wide
    ],
)
def test_programs_that_are_not_decoders_are_declined(kind: Callable[[], TinyDecoder], reason: str) -> None:
    torch.manual_seed(0)
    program = bg.capture(kind().eval(), tokens())
    with pytest.raises(PassError, match=reason):
        bg.Pipeline([KVCache()]).run(program)


def test_a_causal_flag_becomes_a_mask() -> None:
    class Flagged(TinyDecoder):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            x = self.embed(ids)
            for block in self.blocks:
                batch, length, width = x.shape
                q, k, v = (
                    p(x).view(batch, length, 4, -1).transpose(1, 2) for p in (block.q, block.k, block.v)
                )
                mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                x = x + block.o(mixed.transpose(1, 2).reshape(batch, length, width))
            logits: torch.Tensor = self.head(x)
            return logits

    torch.manual_seed(0)
    program = bg.capture(Flagged().eval(), {"ids": tokens()["ids"]})
    assert spec_of(bg.Pipeline([KVCache()]).run(program)).mask is None


def test_losses_and_labels_go() -> None:
    class Trained(TinyDecoder):
        def forward(
            self, ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
        ) -> dict[str, torch.Tensor]:  # type: ignore[override]
            logits = super().forward(ids, attention_mask)
            loss = -logits.log_softmax(-1).gather(-1, labels[..., None]).mean()
            return {"loss": loss, "logits": logits}

    torch.manual_seed(0)
    batch = tokens()
    program = bg.capture(Trained().eval(), {**batch, "labels": batch["ids"].clone()})
    made = bg.Pipeline([KVCache()]).run(program)
    assert [spec.name for spec in made.inputs][:3] == ["ids", "attention_mask", "past_key_0"]
    assert made.outputs[0].name == "logits"


def test_a_mask_wider_than_a_query_is_cut_to_its_rows(decoder: Program) -> None:
    roles = find_sequence_roles(deployed(decoder))
    assert [str(node.target) for node in roles.masks] == ["attention_mask"]
    assert sorted(roles.cached.values()) == ["key_0", "key_1", "value_0", "value_1"]


@pytest.mark.parametrize("longest", [2, 3, 5, 6])
def test_a_few_positions_are_enough(longest: int) -> None:
    """The limit is found, and the cache proven, where a table has fewer rows than the lengths that are tried first."""
    batch = tokens(2, 2)
    program = bg.capture(tiny_decoder(longest=longest, layers=1), batch)
    cached = bg.Pipeline([KVCache()]).run(program)
    assert spec_of(cached).limit == longest
    assert cached.inputs[2].shape == ("batch", 4, "past", 8)


class GivenPlaces(nn.Module):
    """OneAttention whose positions are an input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = OneAttention()

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        inner, length = self.inner, ids.shape[1]
        x = inner.embed(ids) + inner.places(position_ids)
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (x, inner.k(x), inner.v(x)))
        seen = torch.ones(length, length).tril().bool() & mask.bool()[:, None, None, :]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, seen)
        scores: torch.Tensor = mixed.transpose(1, 2).flatten(2) @ inner.embed.weight.T
        return scores


def test_the_table_of_given_positions_is_a_limit() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (2, 6))
    batch = {"ids": ids, "mask": torch.ones_like(ids), "position_ids": torch.arange(6).repeat(2, 1)}
    cached = bg.Pipeline([KVCache()]).run(bg.capture(GivenPlaces(), batch))
    assert spec_of(cached).positions is not None
    assert spec_of(cached).limit == 16
