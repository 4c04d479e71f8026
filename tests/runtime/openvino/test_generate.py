"""Decoders on OpenVINO: ids of a generation are those without a cache, which is appended in place; bundles; what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper

import bmgraph as bg
from bmgraph.backends import Onnx, OpenVINO, Torch
from bmgraph.errors import BackendError, BundleError, DriftError, InputError
from bmgraph.ir.cache_spec import CacheLayout, SlotNames
from bmgraph.ir.program import Program
from bmgraph.passes import Deltas, KVCache, Quantize
from bmgraph.runtime.openvino.compiled import CompiledModels, Settings
from bmgraph.runtime.openvino.engine import OpenVinoEngine
from bmgraph.verify.metrics import relative_error
from bmgraph.verify.rounded_cache import with_rounded_cache
from tests.helpers.bundles import edit_json, sign
from tests.helpers.models import tiny_decoder, tokens
from tests.helpers.openvino import needs_openvino
from tests.passes.test_per_row_deltas import alone, two_deltas
from tests.runtime.generation.test_generate import PROMPTS, naive, word_tokenizer

needs_openvino()


@pytest.fixture(scope="module")
def decoder() -> Program:
    return bg.capture(tiny_decoder(), tokens())


@pytest.fixture(scope="module")
def cached(decoder: Program) -> Program:
    return bg.Pipeline([KVCache()]).run(decoder)


@pytest.fixture(scope="module")
def engine(cached: Program) -> OpenVinoEngine:
    return bg.compile(cached, backend=OpenVINO(threads=1))


def kinds(engine: OpenVinoEngine) -> list[str]:
    """The types of the nodes that OpenVINO runs."""
    graph = engine.models.stateful().runtime_model()
    return [node.get_rt_info()["layerType"].astype(str) for node in graph.get_ops()]


def test_ragged_prompts_go_on_as_without_a_cache(engine: OpenVinoEngine, decoder: Program) -> None:
    """The second prompt has five positions of padding, whose queries see no key at all."""
    assert engine.generate(PROMPTS, max_new_tokens=24) == [naive(decoder, prompt, 24) for prompt in PROMPTS]
    assert engine.report.engine_drift is not None
    assert engine.report.engine_drift < 1e-5
    assert "keeps the KV cache as its state" in str(engine.report)


def test_the_cache_is_appended_within_attention(engine: OpenVinoEngine) -> None:
    found = kinds(engine)
    assert found.count("ScaledDotProductAttention") == 2
    assert found.count("MemoryInput") == found.count("MemoryOutput") == 4
    assert "Softmax" not in found


def test_a_call_takes_and_gives_the_cache(engine: OpenVinoEngine, cached: Program) -> None:
    batch = tokens(3, 9, 5)
    whole = engine(**batch)
    first = {name: value[:, :6] for name, value in batch.items()}
    held = {
        name.replace("present", "past"): value for name, value in engine(**first).items() if "present" in name
    }
    rest = {"ids": batch["ids"][:, 6:], "attention_mask": batch["attention_mask"]}
    assert relative_error(engine(**rest, **held)["output"], whole["output"][:, 6:]) < 1e-5
    expected = cached(**rest, **held)
    for name, value in engine(**rest, **held).items():
        assert relative_error(value, expected[name]) < 1e-5


def test_generations_side_by_side_do_not_see_each_other(engine: OpenVinoEngine, decoder: Program) -> None:
    streams = [engine.generate(prompt, max_new_tokens=6, stream=True) for prompt in PROMPTS]
    turns = list(zip(*streams))
    engine(**tokens())
    assert [list(ids) for ids in zip(*turns)] == [naive(decoder, prompt, 6) for prompt in PROMPTS]


def test_options_are_those_of_all_engines(engine: OpenVinoEngine, cached: Program) -> None:
    other = bg.compile(cached, backend="torch")
    for options in (
        {"temperature": 1.5, "top_k": 9, "seed": 3, "n": 2},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    ):
        assert engine.generate(PROMPTS, max_new_tokens=6, **options) == other.generate(
            PROMPTS, max_new_tokens=6, **options
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "passes",
    [[Quantize("int8", activations="none")], [Quantize("int4", group=16, activations="none")]],
    ids=["int8", "int4"],
)
def test_codes_are_read_by_products(decoder: Program, passes: list[Any], tmp_path: Path) -> None:
    small = bg.Pipeline(passes).run(decoder, target=OpenVINO.target, max_drift=2.0)
    engine = bg.compile(small, backend=OpenVINO(generate=True))
    engine.save(tmp_path / "out")
    for held in (engine, bg.load(tmp_path / "out")):
        assert held.generate(PROMPTS, max_new_tokens=12) == [naive(small, prompt, 12) for prompt in PROMPTS]


def test_products_of_codes_round_blocks_as_the_program_does(decoder: Program, tmp_path: Path) -> None:
    item = Quantize("int4", group=16, site_drift=2.0)
    small = bg.Pipeline([item]).run(decoder, target=OpenVINO.target, max_drift=2.0)
    engine = bg.compile(small, backend=OpenVINO(generate=True))
    assert "round blocks of 16 of their input to 8 bits" in str(engine.report)
    assert "computes float32 in f32" in str(engine.report)
    batch = tokens()
    real, expected = batch["attention_mask"].bool(), small(**batch)["output"]
    engine.save(tmp_path / "out")
    for held in (engine, bg.load(tmp_path / "out")):
        assert held.settings.rounded_blocks == 16
        assert relative_error(held(**batch)["output"][real], expected[real]) < 0.02
    edit_json(tmp_path / "out" / "manifest.json", lambda tree: tree.update(rounded_blocks=7))
    with pytest.raises(BundleError, match="does not say which blocks products round"):
        bg.load(tmp_path / "out")


def test_saved_and_loaded_it_generates_the_same_text(cached: Program, tmp_path: Path) -> None:
    engine = bg.compile(cached, backend=OpenVINO(), resources={"tokenizer": word_tokenizer()})
    expected = engine.generate(["w3 w14", "w8"], max_new_tokens=8)
    engine.save(tmp_path / "engine")
    assert not [
        item.name for item in (tmp_path / "engine").iterdir() if item.suffix in (".xml", ".bin", ".blob")
    ]
    assert bg.load(tmp_path / "engine").generate(["w3 w14", "w8"], max_new_tokens=8) == expected
    edit_json(tmp_path / "engine" / "manifest.json", lambda tree: tree["cache"].update(slots=[]))
    sign(tmp_path / "engine")
    with pytest.raises(BundleError, match="does not declare a valid KV cache"):
        bg.load(tmp_path / "engine")


@pytest.mark.slow
def test_rows_of_one_batch_go_on_with_deltas_of_their_own(decoder: Program, tmp_path: Path) -> None:
    folders = two_deltas(decoder, tmp_path)
    both = bg.Pipeline([Deltas(("trec", "spam"), capacity=3)]).run(decoder, resources=folders)
    engine = bg.compile(both, backend=OpenVINO(generate=True))
    programs = alone(decoder, folders)
    names = ["trec", "spam", None]
    expected = [naive(programs[name], prompt, 6) for name, prompt in zip(names, PROMPTS)]
    engine.save(tmp_path / "engine")
    for held in (engine, bg.load(tmp_path / "engine")):
        assert held.generate(PROMPTS, max_new_tokens=6, delta=names) == expected
        assert held.generate(PROMPTS, max_new_tokens=6) == [naive(decoder, p, 6) for p in PROMPTS]
    engine.deltas.swap("trec", folders["spam"])
    assert engine.generate(PROMPTS[0], max_new_tokens=6, delta="trec") == naive(
        programs["spam"], PROMPTS[0], 6
    )


@pytest.fixture(scope="module")
def small_cache(cached: Program) -> OpenVinoEngine:
    return bg.compile(cached, backend=OpenVINO(threads=1, kv_cache="int8"))


CROSSED = 1e-3
"""What a few of thousand numbers change that lie so near to the middle of two codes that the last bit decides; codes alone change 3e-3."""


def eight_bits(x: torch.Tensor) -> torch.Tensor:
    """Each row of x [..., d] by codes from 0 to 255 between its least and its greatest number, one after the other."""
    rows = []
    for row in x.flatten(0, -2).tolist():
        step = (max(row) - min(row)) / 255
        rows.append([min(row) + round((number - min(row)) / step) * step for number in row])
    return torch.tensor(rows).view_as(x)


def test_a_cache_in_8_bits_holds_what_a_naive_reference_rounds(
    small_cache: OpenVinoEngine, cached: Program
) -> None:
    batch = tokens(3, 9, 5)
    first = {name: value[:, :6] for name, value in batch.items()}
    given, plain = small_cache(**first), cached(**first)
    assert relative_error(given["output"], plain["output"]) < 1e-5
    presents = [name for name in given if "present" in name]
    assert len(presents) == 4
    for name in presents:
        assert relative_error(given[name], eight_bits(plain[name])) < CROSSED
        assert relative_error(given[name], plain[name]) > 2e-3
    held = {name.replace("present", "past"): given[name] for name in presents}
    rest = {"ids": batch["ids"][:, 6:], "attention_mask": batch["attention_mask"]}
    found, exact = small_cache(**rest, **held), cached(**rest, **held)
    assert 1e-5 < relative_error(found["output"], exact["output"]) < 0.02
    for name in presents:  # what was rounded stays what it was
        assert relative_error(found[name][:, :, :6], given[name]) < 1e-5
    expected = with_rounded_cache(cached, {**rest, **held})
    assert relative_error(found["output"], expected["output"]) < CROSSED


def test_a_report_says_what_8_bits_save_and_move(small_cache: OpenVinoEngine) -> None:
    said = " ".join(str(small_cache.report).split())
    assert "256 bytes for each position of a row instead of 512" in said
    assert re.search(r"8 bits moves the logits by 0\.\d\d% \(relative L2\) behind 4 cached positions", said)
    assert kinds(small_cache).count("ScaledDotProductAttention") == 2


def test_a_cache_in_8_bits_is_saved_and_loaded(
    small_cache: OpenVinoEngine, decoder: Program, tmp_path: Path
) -> None:
    ids = small_cache.generate(PROMPTS, max_new_tokens=12)
    exact = [naive(decoder, prompt, 12) for prompt in PROMPTS]
    same = sum(a == b for x, y in zip(ids, exact) for a, b in zip(x, y))
    assert same >= 0.75 * sum(map(len, exact))  # ids that are nearly as likely may change places
    small_cache.save(tmp_path / "out")
    loaded = bg.load(tmp_path / "out")
    assert loaded.settings.kv_cache == "int8"
    assert loaded.generate(PROMPTS, max_new_tokens=12) == ids
    beams = loaded.generate(PROMPTS, max_new_tokens=6, num_beams=3)
    assert all(len(row) == 6 for row in beams)
    edit_json(tmp_path / "out" / "manifest.json", lambda tree: tree["openvino"].update(kv_cache="int3"))
    sign(tmp_path / "out")
    with pytest.raises(BundleError, match="does not say how OpenVINO computes"):
        bg.load(tmp_path / "out")


def test_a_cache_that_cannot_be_kept_in_8_bits_is_refused(decoder: Program, cached: Program) -> None:
    with pytest.raises(InputError, match=r"on backend 'onnx': .*; leave it out, or take OpenVINO"):
        bg.compile(decoder, backend=Onnx(generate=True, kv_cache="int8"))
    with pytest.raises(InputError, match=r"on backend 'torch': torch's attention"):
        bg.compile(decoder, backend=Torch(generate=True, kv_cache="int8"))
    with pytest.raises(InputError, match="kv_cache='int4': choose 'float' or 'int8'"):
        bg.compile(decoder, backend=OpenVINO(generate=True, kv_cache="int4"))
    with pytest.raises(BackendError, match=r"the program has no KV cache: add generate=True"):
        bg.compile(decoder, backend=OpenVINO(kv_cache="int8"))
    with pytest.raises(
        DriftError, match=r"moves the logits by 0\.\d+ .* more than 0\.0001: leave kv_cache out"
    ):
        bg.compile(cached, backend=OpenVINO(kv_cache="int8"), max_drift=1e-4)


@pytest.mark.parametrize("last", ["size", ""])
def test_heads_of_a_size_that_is_not_known_are_refused(last: str, tmp_path: Path) -> None:
    """Or a cache to which attention does not append by itself, which would stay in floats."""
    past = helper.make_tensor_value_info("past", TensorProto.FLOAT, ["b", 2, "p", 8])
    new = helper.make_tensor_value_info("new", TensorProto.FLOAT, ["b", 2, "s", last or 8])
    present = helper.make_tensor_value_info("present", TensorProto.FLOAT, ["b", 2, "t", 8])
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", "s"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s"])
    nodes = [
        helper.make_node("Cast", ["ids"], ["logits"], to=TensorProto.FLOAT),
        helper.make_node("Concat", ["past", "new"], ["present"], axis=2),
    ]
    graph = helper.make_graph(nodes, "g", [ids, past, new], [logits, present])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "m.onnx")
    layout = CacheLayout("ids", "logits", (SlotNames("past", "present", 2),))
    why = "has heads of a size that the model does not fix" if last else "outside of attention"
    with pytest.raises(BackendError, match=f"kv_cache='int8': .*{why}"):
        CompiledModels(
            tmp_path / "m.onnx", ["ids", "past", "new"], Settings("f32", 1, kv_cache="int8"), 0,
            outputs=["logits", "present"], cache=layout,
        ).stateful()  # fmt: skip


def test_a_cache_of_a_fixed_size_is_refused(tmp_path: Path) -> None:
    past = helper.make_tensor_value_info("past", TensorProto.FLOAT, ["b", 2, 32, 8])
    present = helper.make_tensor_value_info("present", TensorProto.FLOAT, ["b", 2, 32, 8])
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", "s"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s"])
    nodes = [
        helper.make_node("Cast", ["ids"], ["logits"], to=TensorProto.FLOAT),
        helper.make_node("Identity", ["past"], ["present"]),
    ]
    graph = helper.make_graph(nodes, "g", [ids, past], [logits, present])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "m.onnx")
    layout = CacheLayout("ids", "logits", (SlotNames("past", "present", 2),))
    with pytest.raises(
        BackendError, match="'past' has room for 32 positions, and that of an OpenVINO engine grows"
    ):
        CompiledModels(
            tmp_path / "m.onnx",
            ["ids", "past"],
            Settings("f32", 1),
            0,
            outputs=["logits", "present"],
            cache=layout,
        )
