"""Steps of many positions on a second form: as near to what codes say as the first, rows apart from each other, and only where it is asked
for, fits and is faster."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import bmgraph as bg
from bmgraph.backends import Onnx
from bmgraph.passes import Deltas, Quantize
from bmgraph.runtime.generation.batching.options import Batching
from bmgraph.runtime.generation.decode_loop import step_feeds
from bmgraph.runtime.generation.row_values import no_values
from bmgraph.runtime.ort import wide_form, wide_products
from tests.helpers.models import tokens
from tests.helpers.rotary_decoder import rotary_decoder
from tests.passes.test_per_row_deltas import two_deltas

IDS = np.random.default_rng(1).integers(0, 50, 24).tolist()


@cache
def engine(bias: bool = False, symmetric: bool = True) -> Any:
    passes = [Quantize("int4", method="rtn", group=16, symmetric=symmetric)]
    return bg.compile(
        rotary_decoder(width=64, bias=bias),
        passes,
        example=tokens(),
        backend=Onnx(generate=True, threads=1),
        max_drift=2.0,
    )


def from_positions(monkeypatch: pytest.MonkeyPatch, least: int | None) -> None:
    """What timing would find; a model of 64 channels is no faster so."""
    monkeypatch.setattr(wide_form, "_least", lambda *_: least)


def scored(decoder: Any, rows: list[list[int]]) -> np.ndarray:
    """The logits f[B, V] after the last id of rows of one length, which one step reads."""
    tokens_ = np.array(rows, np.int64)
    feeds = step_feeds(
        decoder.cache,
        tokens_,
        np.ones_like(tokens_),
        no_values(decoder.cache.others, len(rows)),
        [tokens_.shape[1] - 1],
    )
    found: np.ndarray = decoder.start(len(rows), {}, 32).step(feeds).copy()
    return found


@pytest.mark.parametrize(
    ("bias", "symmetric"), [(True, False), pytest.param(False, True, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("longest", [48, 768])
def test_the_second_form_multiplies_what_codes_say(
    bias: bool, symmetric: bool, longest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside products that round nothing, with one segment and with several of inputs."""
    monkeypatch.setattr(wide_products, "LONGEST", longest)
    from_positions(monkeypatch, 2)
    made = engine(bias, symmetric)
    found = wide_form.wide_form(made.files, 1, made.decoder())
    assert found is not None
    exact = wide_products.exact_form(onnx.load(str(made.folder / made.files.model), load_external_data=False))
    del exact.graph.output[len(made.outputs) :]
    (tmp_path / "exact.onnx").write_bytes(exact.SerializeToString())
    feeds = wide_form._feeds(made.decoder(), IDS)
    held = made.files.read()
    sessions = (
        wide_form.make_session(
            wide_form.ModelInMemory(tmp_path, exact.SerializeToString(), held.weights),
            ["CPUExecutionProvider"],
            1,
        ),
        found.session,
        made.session,
    )
    exactly, wide, few = (item.run([made.decoder().cache.logits.name], feeds)[0] for item in sessions)
    errors = [np.linalg.norm(item - exactly) / np.linalg.norm(exactly) for item in (wide, few)]
    assert 0 < errors[0] < 0.08
    assert errors[0] < 2 * errors[1]


def test_scales_of_rows_wait_for_the_product_behind_a_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up are products of their own, of which one is multiplied by no scale of rows and has what smooths their result in its own
    scales; a row of zeros stays one."""
    from_positions(monkeypatch, 2)
    written: list[onnx.ModelProto] = []
    write = wide_products.write_wide_form

    def kept(model: onnx.ModelProto, *rest: Any) -> None:
        write(model, *rest)
        written.append(model)

    monkeypatch.setattr(wide_form, "write_wide_form", kept)
    made = engine(True, False)
    assert wide_form.wide_form(made.files, 1, made.decoder()) is not None
    nodes = written[0].graph.node
    products = [node for node in nodes if node.op_type == "MatMulIntegerToFloat"]
    makers = {name: node for node in nodes for name in node.output}
    gates = [
        node
        for node in nodes
        if node.op_type == "Mul" and all(name in makers for name in node.input)
        and any(makers[name] in products for name in node.input) and not node.name.endswith("_scaling")
    ]  # fmt: skip
    assert len(gates) == 2  # one a layer
    assert not any(name.endswith("_factors") for node in gates for name in node.input)
    assert not any(node.op_type == "Split" and node.input[0] in products for node in nodes)


def test_steps_choose_by_their_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    from_positions(monkeypatch, 8)
    made = engine(True, False)
    plain = made.decoder()
    plain._widened = None
    wide = plain.for_batching(True)
    assert plain.for_batching(False) is plain
    assert wide.wide_form.least == 8
    assert plain.wide_form is None
    np.testing.assert_array_equal(scored(wide, [IDS[:7]]), scored(plain, [IDS[:7]]))
    assert (scored(wide, [IDS[:8]]) != scored(plain, [IDS[:8]])).any()
    rows = [IDS[place : place + 1] for place in range(8)]
    together = scored(wide, rows)
    assert (together != scored(plain, rows)).any()
    loud = [[IDS[0]] * 1, *([49] for _ in range(7))]
    np.testing.assert_allclose(
        scored(wide, loud)[0], together[0], rtol=1e-5, atol=1e-5
    )  # of its neighbours nothing


def test_requests_that_join_and_leave_have_the_ids_of_one_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 3 rows or more run on the second, prompts of 3 ids too: their caches are one."""
    from_positions(monkeypatch, 3)
    made = engine(True, False)
    made.decoder()._widened = None
    made.batching = Batching(rows=4, wide=True, prefill=8)
    try:
        found = [made.submit(IDS[:count], max_new_tokens=6, logprobs=1) for count in (1, 9, 5, 12, 24, 2)]
        answers = [item.result(60) for item in found]
        assert all(len(item.ids) == 6 for item in answers)
        assert "8-bit integers" in made.scheduler().wide_form
    finally:
        made.stop_batching()
    made.batching = Batching(rows=4)
    try:
        for item, count in zip(answers, (1, 9, 5, 12, 24, 2)):
            other = made.submit(IDS[:count], max_new_tokens=6, logprobs=1).result(60)
            ours, theirs = (answer.scores[0].logprob for answer in (item, other))
            assert abs(ours - theirs) < 0.2
        assert made.scheduler().wide_form == ""
    finally:
        made.stop_batching()


def test_none_where_it_is_no_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(True, False)
    decoder = made.decoder()
    with monkeypatch.context() as patch:
        from_positions(patch, None)
        assert wide_form.wide_form(made.files, 1, decoder) is None
    with monkeypatch.context() as patch:
        patch.setattr(wide_form, "memory_budget", lambda: 1000)
        assert wide_form.wide_form(made.files, 1, decoder) is None
    with monkeypatch.context() as patch:
        divergences = iter([0.01, 0.1])
        patch.setattr(wide_form, "_divergence", lambda *_: next(divergences))
        assert wide_form.wide_form(made.files, 1, decoder) is None
    plain = bg.compile(rotary_decoder(), example=tokens(), backend=Onnx(generate=True, threads=1))
    assert wide_form.wide_form(plain.files, 1, plain.decoder()) is None


@pytest.mark.parametrize(
    ("size", "count"),
    [(576, 1), (768, 1), (1536, 2), (4096, 8), (11008, 16), (8960, 14), (1009, 1), (4099, 1)],
)
def test_segments_are_equal_and_not_long(size: int, count: int) -> None:
    assert wide_products.segments(size) == count
    assert size % count == 0


@pytest.mark.slow
def test_rows_choose_deltas_on_both_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of deltas are inputs of both sessions; one that is exchanged is exchanged for both."""
    from_positions(monkeypatch, 3)
    program = bg.capture(rotary_decoder(width=64), tokens())
    folders = two_deltas(program, tmp_path)
    made = bg.compile(
        program, [Quantize("int4", method="rtn", group=16), Deltas(("trec", "spam"))], resources=folders,
        backend=Onnx(generate=True, threads=1), max_drift=2.0,
    )  # fmt: skip

    def first_scores(wide: bool) -> list[float]:
        made.batching = Batching(rows=4, wide=wide, prefix_bytes=0)
        try:
            asked = [
                made.submit(IDS[:6], max_new_tokens=2, logprobs=1, delta=name, logit_bias={7: 100.0})
                for name in ("trec", "spam", "trec", "spam")
            ]
            answers = [item.result(60) for item in asked]
            assert bool(made.scheduler().wide_form) == wide
        finally:
            made.stop_batching()
        return [score.logprob for answer in answers for score in answer.scores]

    both = [first_scores(wide) for wide in (True, False)]
    assert np.abs(np.subtract(*both)).max() < 0.5
    assert abs(both[0][0] - both[0][2]) > 1e-3  # the deltas differ
    made.deltas.swap("trec", folders["spam"])
    swapped = first_scores(True)
    np.testing.assert_allclose(swapped[:2], swapped[2:4], atol=1e-4)
