"""Shrink of several kinds at once, beside other passes, to engines and back: slow, since each compiles or replays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import AdamW, Onnx, Torch
from bmgraph.ir.program import Program
from bmgraph.passes import Distill, LoRA, Prune, Quantize, Shrink
from tests.helpers.deltas import replay_in_a_fresh_process
from tests.helpers.grouped_decoder import GroupedDecoder, grouped_decoder
from tests.helpers.models import tokens
from tests.helpers.shrunk import by_hand
from tests.passes.test_shrink_kinds import EXACT, distance, labelled, run, without_layers

pytestmark = pytest.mark.slow

ALL = Shrink(layers=(1,), hidden=0.25, ffn=0.25, heads=0.5, head_size=0.25, scope="global")


@pytest.fixture(scope="module")
def decoder() -> tuple[GroupedDecoder, Program]:
    model = grouped_decoder()
    return model, bg.capture(model, labelled())


def test_the_layer_that_turns_the_hidden_state_least_goes() -> None:
    model = grouped_decoder(4)
    with torch.no_grad():
        for linear in (model.layers[2].o, model.layers[2].down):
            linear.weight *= 0.05
    program = bg.capture(model, labelled())
    given = [tokens(seed=seed) | {"labels": tokens(seed=seed)["ids"]} for seed in range(2)]
    small = run(Shrink(layers=0.25), program, calibration=given)
    assert distance(small, without_layers(model, "layers", (2,))) < EXACT
    states: list[torch.Tensor] = []
    model.layers[2].register_forward_hook(lambda layer, args, result: states.extend((args[0], result)))
    with torch.no_grad():
        for batch in given:
            model(**batch)
    before, after = (torch.cat([item.flatten(0, 1) for item in states[start::2]]) for start in (0, 1))
    cosine = float(nn.functional.cosine_similarity(before, after, -1).mean())
    assert (
        small.history[-1].edits[0].what
        == f"layer 2 removed: cosine of what enters and leaves it {cosine:.4f}"
    )


def test_all_at_once_trains_deploys_and_comes_back(
    decoder: tuple[GroupedDecoder, Program], tmp_path: Path
) -> None:
    _, program = decoder
    small = run(ALL, program, max_drift=3.0)
    assert [item.features for item in small.structure().feedforwards]
    trainer = bg.compile(small, backend=Torch(optimizer=AdamW(lr=1e-2)))
    losses = [trainer.step(labelled(4, 9)).loss for _ in range(3)]
    assert losses[-1] < losses[0]
    tuned = trainer.program()
    tuned.save(str(tmp_path / "tuned"))
    loaded = bg.load(tmp_path / "tuned")
    for name, value in tuned(**labelled()).items():
        assert torch.equal(loaded(**labelled())[name], value)
    pytest.importorskip("onnxruntime")
    engine = bg.compile(loaded, backend=Onnx(generate=True))
    written = [3, 7, 9]
    for _ in range(4):
        batch = {
            "ids": torch.tensor([written]),
            "attention_mask": torch.ones(1, len(written), dtype=torch.int64),
        }
        logits = tuned(**batch, labels=batch["ids"])["logits"]
        written.append(int(logits[0, -1].argmax()))
    assert engine.generate([[3, 7, 9]], max_new_tokens=4, eos=()) == [written[3:]]


def test_replayed_to_equal_bits(program: Program, tmp_path: Path) -> None:
    run(Shrink(layers=(1,), hidden=0.25, head_size=0.25), program).save(str(tmp_path / "small"))
    replay_in_a_fresh_process(
        tmp_path / "small", "from tests.helpers.models import tiny_encoder", "tiny_encoder()"
    )


def test_deltas_codes_and_teachers_go_with_it(decoder: tuple[GroupedDecoder, Program]) -> None:
    model, program = decoder
    batches = [labelled(seed=seed) for seed in range(2)]
    for earlier in ([LoRA(r=2, roles=("*",))], [Quantize("int8", activations="none")], [Prune()]):
        given = bg.Pipeline(earlier).run(program, max_drift=3.0)
        small = bg.Pipeline([Shrink(hidden=0.25, head_size=0.5), Shrink(layers=(0,))]).run(
            given, max_drift=3.0
        )
        widths = {size for name, item in small.parameters.items() if "first" in name for size in item.shape}
        assert widths == {24}
    student = bg.Pipeline(
        [
            Shrink(layers=(1,), hidden=0.25),
            Distill(teacher="teacher", data="text", steps=2, on=("logits", "hidden"), layers=((1, 2),)),
            Quantize("int8", activations="none"),
        ]
    ).run(program, resources={"teacher": model, "text": batches}, max_drift=3.0)
    assert [record.text[:7] for record in student.history] == ["shrink{", "distill", "quantiz"]


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (Shrink(queries=0.5), "2 of 4 heads: "),
        (Shrink(heads=0.5), "2 of 4 heads: "),
        (Shrink(head_size=0.25), "6 of 8 features of queries and keys: "),
    ],
    ids=str,
)
@pytest.mark.parametrize("interleaved", [False, True])
def test_what_is_left_of_heads_computes_what_it_did(item: Shrink, said: str, interleaved: bool) -> None:
    model = grouped_decoder(2, interleaved)
    program = bg.capture(model, labelled())
    small = run(item, program)
    assert distance(small, by_hand(model, small)) < EXACT
    assert small.history[-1].edits[0].what.startswith(said)
    assert small.structure().roles == program.structure().roles
