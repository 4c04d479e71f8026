"""Distill on attentions, relations, embeddings and layer by layer: the loss is the plain formula's, with any trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax

import bmgraph as bg
import bmgraph.pipeline
from bmgraph.backends import SGD, Torch
from bmgraph.errors import InputError, PassError
from bmgraph.ir.program import Program
from bmgraph.passes import Distill, Shrink, SoftPrompt, ZeRO
from tests.helpers.models import tiny_decoder, tiny_encoder, tokens
from tests.helpers.ranks import run_ranks
from tests.helpers.recorded_losses import recorded_losses
from tests.helpers.zoo import BY_NAME, Batch

STILL = Torch(optimizer=SGD(lr=0.0))


def data(count: int = 2) -> list[Batch]:
    return [tokens(4, 8 + seed, seed) for seed in range(count)]


def losses(
    item: Distill, program: Program, teacher: object, text: list[Batch], trainer: Any = STILL
) -> list[float]:
    """The losses of the steps."""
    with recorded_losses() as found:
        given = {"teacher": teacher, "text": text, "trainer": trainer}
        done = bg.Pipeline([item]).run(program, resources=given)
    assert list(done.parameters) == list(program.parameters)
    assert str(done) == str(program)
    return found


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def by_position(error: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The sum of errors f[B, S] over positions that are not padding."""
    return (error * batch["attention_mask"]).sum()


def read(model: nn.Module, batch: Batch) -> list[dict[str, torch.Tensor]]:
    """For each block of a plain model: q, k, v [B, H, S, D], and what enters and leaves it."""
    found: list[dict[str, torch.Tensor]] = []
    hooks = []
    for block in model.blocks:

        def see(block: Any, given: Any, out: torch.Tensor) -> None:
            x, mask = given
            heads = [
                p(x).unflatten(-1, (block.heads, -1)).transpose(1, 2) for p in (block.q, block.k, block.v)
            ]
            found.append({**dict(zip("qkv", heads)), "in": x, "out": out, "mask": mask})

        hooks.append(block.register_forward_hook(see))
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return found


def scores(one: dict[str, torch.Tensor]) -> torch.Tensor:
    product = one["q"] @ one["k"].transpose(-1, -2) / math.sqrt(one["q"].shape[-1])
    return product.masked_fill(~one["mask"], -torch.inf)


def relation(one: dict[str, torch.Tensor], what: str, heads: int) -> torch.Tensor:
    rows = one[what].transpose(1, 2).flatten(2)
    parts = rows.unflatten(-1, (heads, -1)).transpose(1, 2)
    return (parts @ parts.transpose(-1, -2) / math.sqrt(parts.shape[-1])).masked_fill(
        ~one["mask"], -torch.inf
    )


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher, student) of scores at each query, a mean over heads."""
    each = kl_div(log_softmax(student, -1), teacher.softmax(-1), reduction="none")
    return each.nan_to_num(0.0).sum(-1).mean(1)


def naive(on: str, student: nn.Module, teacher: nn.Module, batch: Batch, heads: int = 4) -> float:
    mine, other = read(student, batch), read(teacher, batch)
    pairs = [(mine[0], other[1]), (mine[1], other[3])]
    if on == "attention":
        terms = [(scores(a).softmax(-1) - scores(b).softmax(-1)).square().mean(-1).mean(1) for a, b in pairs]
    elif on == "attention_kl":
        terms = [divergence(scores(a), scores(b)) for a, b in pairs]
    elif on == "relations":
        terms = [
            divergence(relation(a, what, heads), relation(b, what, heads)) for a, b in pairs for what in "qkv"
        ]
    elif on == "embeddings":
        terms = [(mine[0]["in"] - other[0]["in"]).square().mean(-1)]
    else:
        blocks = zip(student.blocks, (other[0], other[2]), (other[1], other[3]))
        with torch.no_grad():
            terms = [(block(a["in"], a["mask"]) - b["out"]).square().mean(-1) for block, a, b in blocks]
    total = sum(by_position(term, batch) for term in terms)
    return float(total / (len(terms) * batch["attention_mask"].sum()))


QUICK = ("attention_kl",)
ALL = ("attention", "attention_kl", "relations", "embeddings", "layerwise")


@pytest.mark.parametrize(
    "on", [pytest.param(on, marks=() if on in QUICK else pytest.mark.slow) for on in ALL]
)
def test_the_loss_is_the_plain_formulas(on: str) -> None:
    student, teacher, text = without_dropout(tiny_encoder(1)), tiny_encoder(2, layers=4), data()
    programs = [bg.capture(model, text[0]) for model in (student, teacher)]
    found = losses(Distill(on=on, steps=2), *programs, text)
    assert found == pytest.approx([naive(on, student, teacher, batch) for batch in text], rel=2e-5)


@pytest.mark.slow
def test_relations_need_no_equal_heads() -> None:
    student, text = without_dropout(tiny_encoder(1, heads=2)), data(1)
    teacher = tiny_encoder(2, width=48, heads=6, layers=4)
    programs = [bg.capture(model, text[0]) for model in (student, teacher)]
    program = programs[0]
    found = losses(Distill(on="relations", relation_heads=8, steps=1), *programs, text)
    assert found == pytest.approx([naive("relations", student, teacher, text[0], 8)], rel=2e-5)
    with pytest.raises(
        PassError, match="its queries have 32 features in the program, which is not a multiple of 6 parts"
    ):
        losses(Distill(on="relations", steps=1), program, programs[1], text)
    with pytest.raises(
        PassError, match="attention of layer 0 has 2 heads and the teacher's 6: distill with on='relations'"
    ):
        losses(Distill(on="attention", steps=1), program, programs[1], text)
    with pytest.raises(PassError, match="layer 0 has 32 channels and the teacher's hidden state 48"):
        losses(Distill(on="layerwise", steps=1), program, programs[1], text)


NAMES = ("llama", "gpt2", "bert", "t5", "gemma2", "opt")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_maps_are_the_models_own(name: str) -> None:
    """Grouped keys, biases, caps of scores and causal masks: the distance of maps that the models return themselves."""
    entry = BY_NAME[name]
    student, teacher = entry.build(), entry.build()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    batch = entry.example(3, 9)
    programs = [bg.capture(model, batch) for model in (student, teacher)]
    found = losses(Distill(on="attention_kl", steps=1), *programs, [batch])
    maps = []
    for model in (student, teacher):
        model.eval().set_attn_implementation("eager")
        with torch.no_grad():
            out = model(**batch, output_attentions=True)
        keys = (
            ["attentions"]
            if "attentions" in out
            else ["encoder_attentions", "decoder_attentions", "cross_attentions"]
        )
        maps.append([item for key in keys for item in out[key]])
    assert len(maps[0]) >= 2
    mask = next((batch[key] for key in ("attention_mask",) if key in batch), None)
    total, count = torch.zeros(()), torch.zeros(())
    for mine, other in zip(*maps):
        each = (other * (other.clamp(min=1e-30).log() - mine.clamp(min=1e-30).log())).sum(-1).mean(1)
        kept = mask if mask is not None and mask.shape == each.shape else torch.ones_like(each)
        total, count = total + (each * kept).sum(), count + kept.sum()
    assert found == pytest.approx([float(total / count)], rel=1e-3)


def test_layers_take_a_table() -> None:
    assert Distill(on="attention", layers={0: 1, 1: 3}) == Distill(on="attention", layers=((0, 1), (1, 3)))  # type: ignore[arg-type]


@pytest.mark.slow
def test_causal_attention_and_a_prompt() -> None:
    """Positions of a soft prompt count neither as queries nor as keys."""
    student, teacher, text = without_dropout(tiny_decoder(1)), tiny_decoder(2), data(1)
    programs = [bg.capture(model, text[0]) for model in (student, teacher)]
    prompted = bg.Pipeline([SoftPrompt(tokens=3)]).run(programs[0])
    for on in ("attention", "attention_kl"):
        assert len(losses(Distill(on=on, steps=1), prompted, programs[1], text)) == 1
    again = losses(Distill(on="attention", steps=1), programs[0], programs[0], text)
    assert again == pytest.approx([0.0], abs=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("on", ["attention", "relations", "layerwise"])
def test_a_shrunk_student_comes_nearer(on: str) -> None:
    teacher = bg.capture(tiny_encoder(2, layers=4), tokens())
    student = bg.Pipeline([Shrink(layers=(1, 2), ffn=0.5)]).run(teacher)
    curve = losses(Distill(on=on, steps=60), student, teacher, data(4), None)
    assert curve[-1] < 0.7 * curve[0]


def _curve(rank: int, folder: str, trainer: Torch[Any]) -> list[float]:
    programs = [bg.load(f"{folder}/{name}") for name in ("student", "teacher")]
    found = [
        losses(Distill(on=on, steps=2), *programs, data(), trainer)
        for on in (("logits", "attention", "embeddings"), "relations", "layerwise")
    ]
    return [value for curve in found for value in curve]


@pytest.mark.slow
def test_any_trainer(tmp_path: Path) -> None:
    """Two ranks, micro-batches and bf16 have the losses of one process in fp32."""
    for name, model in (("student", tiny_encoder(1)), ("teacher", tiny_encoder(2, layers=4))):
        bg.capture(without_dropout(model), data(1)[0]).save(tmp_path / name)
    rule = SGD(lr=0.05)
    expected = _curve(0, str(tmp_path), Torch(optimizer=rule))
    for curve in run_ranks(2, _curve, str(tmp_path), Torch(optimizer=rule, passes=(ZeRO(3),))):
        assert curve == pytest.approx(expected, rel=1e-4)
    assert _curve(0, str(tmp_path), Torch(optimizer=rule, accumulate=2)) == pytest.approx(expected, rel=1e-4)
    half = _curve(0, str(tmp_path), Torch(optimizer=rule, precision="bf16"))
    assert half == pytest.approx(expected, rel=3e-2)


@pytest.mark.slow
def test_what_does_not_fit_is_refused() -> None:
    program = bg.capture(tiny_encoder(1), tokens())
    teacher = bg.capture(tiny_encoder(2, layers=4), tokens())
    for layers, message in (
        (((0, 3), (1, 1)), "pair later layers with later ones"),
        (((0, 9),), r"layers=\(0, 9\): the program's layers are 0 to 1"),
    ):
        with pytest.raises(PassError, match=message):
            losses(Distill(on="layerwise", steps=1, layers=layers), program, teacher, data())
    with pytest.raises(PassError, match="an engine does not expose what on='relations' reads"):
        losses(Distill(on="relations", steps=1), program, bg.compile(teacher, backend="torch"), data())


def test_bad_options_are_refused() -> None:
    for options, message in (
        ({"on": ("layerwise", "logits")}, "in a Distill of its own"),
        (
            {"on": "logits", "relation_heads": 4},
            "relation_heads=4: give a number of parts, with on='relations'",
        ),
        ({"cache_limit": "much"}, "cache_limit='much': give a number of bytes"),
    ):
        with pytest.raises(InputError, match=message):
            Distill(**options)  # type: ignore[arg-type]
