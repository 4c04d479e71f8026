"""Prefix: a naive form with concatenated keys, PEFT, the cache, files, engines and refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import Onnx, Torch
from bmgraph.deltas.prefix import prefixes_of
from bmgraph.deltas.prefix_format import places_in_peft
from bmgraph.errors import InputError, MisplacedError, OrderError, PassError
from bmgraph.ir.program import Program
from bmgraph.ir.tensor_spec import Range
from bmgraph.passes import LoadDelta, LoRA, Prefix, SoftPrompt
from bmgraph.verify.metrics import relative_error
from tests.helpers.captured import NAMES, captured
from tests.helpers.models import TinyDecoder, tiny_decoder, tokens
from tests.helpers.peft_models import EXACT, PROMPTED, stirred
from tests.helpers.zoo import BY_NAME

TOKENS = 3


@pytest.fixture(scope="module")
def decoder() -> Program:
    return bg.capture(tiny_decoder(), tokens())


@pytest.fixture(scope="module")
def prefixed(decoder: Program) -> Program:
    return stirred(bg.Pipeline([Prefix(TOKENS)]).run(decoder))


def naive(
    model: TinyDecoder, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The logits of a TinyDecoder whose text has its positions behind the prefix."""
    ids, mask = batch["ids"], batch["attention_mask"]
    rows, length = ids.shape
    count = len(next(iter(pairs.values()))[0])
    places = torch.arange(count, count + length)
    x = model.embed(ids) + model.places(places)
    seen = torch.arange(count + length)[None, :] <= places[:, None]
    real = torch.cat([torch.ones(rows, count), mask], 1).bool()
    for block, pair in zip(model.blocks, pairs.values()):
        q, k, v = (
            p(x).view(rows, length, block.heads, -1).transpose(1, 2) for p in (block.q, block.k, block.v)
        )
        k, v = (
            torch.cat([own.transpose(0, 1).expand(rows, -1, -1, -1), value], 2)
            for own, value in zip(pair, (k, v))
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, seen & real[:, None, None, :])
        x = block.first(x + block.o(mixed.transpose(1, 2).reshape(rows, length, -1)))
        x = block.second(x + block.down(nn.functional.gelu(block.up(x))))
    logits: torch.Tensor = model.head(x)
    return logits


def trainable(program: Program) -> nn.Module:
    module = program.module()
    for name, item in module.named_parameters():
        item.requires_grad_(name not in program.frozen)
    return module


def pairs_of(program: Program) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {
        f"blocks.{index}": tuple(
            program.parameters[f"blocks.{index}.prefix_{which}"][0].transpose(0, 1)
            for which in ("key", "value")
        )
        for index in range(2)
    }  # type: ignore[return-value]


def test_numbers_and_gradients_equal_the_naive_form(prefixed: Program) -> None:
    model, batch = tiny_decoder().requires_grad_(False), tokens(4, 9, 6)
    pairs = pairs_of(prefixed)
    assert relative_error(prefixed(**batch)["output"], naive(model, pairs, batch)) < EXACT
    assert set(prefixed.parameters) - prefixed.frozen == {
        f"blocks.{index}.prefix_{which}" for index in range(2) for which in ("key", "value")
    }
    module = trainable(prefixed)
    (found,) = module(*(batch[spec.name] for spec in prefixed.inputs))
    found.square().sum().backward()
    leaves = [value.clone().requires_grad_() for pair in pairs.values() for value in pair]
    again = dict(zip(pairs, zip(leaves[::2], leaves[1::2])))
    naive(model, again, batch).square().sum().backward()
    gradients = [
        dict(module.named_parameters())[f"blocks.{index}.prefix_{which}"].grad
        for index in range(2)
        for which in ("key", "value")
    ]
    for mine, leaf in zip(gradients, leaves):
        assert mine is not None
        assert leaf.grad is not None
        assert relative_error(mine[0].transpose(0, 1), leaf.grad) < EXACT


def test_a_network_makes_keys_and_values_and_files_hold_what_it_makes(
    decoder: Program, tmp_path: Path
) -> None:
    done = stirred(bg.Pipeline([Prefix(TOKENS, projection=True, hidden=5)]).run(decoder))
    values = done.parameters
    hidden = torch.tanh(
        nn.functional.linear(
            values["prefix_embedding"], values["prefix_hidden_weight"], values["prefix_hidden_bias"]
        )
    )
    pairs = {
        f"blocks.{index}": tuple(
            nn.functional.linear(
                hidden,
                values[f"blocks.{index}.prefix_{which}_weight"],
                values[f"blocks.{index}.prefix_{which}_bias"],
            ).view(TOKENS, 4, 8)
            for which in ("key", "value")
        )
        for index in range(2)
    }
    batch = tokens(4, 9, 6)
    expected = naive(tiny_decoder(), pairs, batch)  # type: ignore[arg-type]
    assert relative_error(done(**batch)["output"], expected) < EXACT
    done.save_delta(str(tmp_path / "prefix"))
    assert sum(file.stat().st_size for file in (tmp_path / "prefix").iterdir()) < 20_000
    loaded = bg.Pipeline([LoadDelta("d")]).run(decoder, resources={"d": tmp_path / "prefix"})
    assert relative_error(loaded(**batch)["output"], expected) < EXACT


def test_generation_keeps_the_prefix_in_front_of_the_cache(prefixed: Program) -> None:
    engine: Any = bg.compile(prefixed, backend=Torch(generate=True))
    prompts = [[3, 4, 5, 6], [7, 8]]
    found = engine.generate(prompts, max_new_tokens=4)
    for prompt, row in zip(prompts, found):
        ids = list(prompt)
        for _ in range(4):
            given = torch.tensor([ids])
            ids.append(
                int(prefixed(ids=given, attention_mask=torch.ones_like(given))["output"][0, -1].argmax())
            )
        assert list(row)[-4:] == ids[-4:]


@pytest.mark.slow
def test_some_attentions_and_two_families(decoder: Program, tmp_path: Path) -> None:
    done = bg.Pipeline([LoRA(r=2), Prefix(TOKENS, targets="blocks.1")]).run(decoder)
    assert list(prefixes_of(done)) == ["blocks.1"]
    assert done.structure().roles == decoder.structure().roles
    with pytest.raises(InputError, match="families"):
        done.save_delta(str(tmp_path / "both"))
    alone = stirred(bg.Pipeline([Prefix(TOKENS, targets="blocks.1")]).run(decoder))
    alone.save_delta(str(tmp_path / "one"))
    loaded = bg.Pipeline([LoadDelta("d")]).run(decoder, resources={"d": tmp_path / "one"})
    batch = tokens(4, 9, 6)
    assert torch.equal(loaded(**batch)["output"], alone(**batch)["output"])
    other = bg.capture(tiny_decoder(seed=1), tokens())
    with pytest.raises(MisplacedError, match="another backbone"):
        bg.Pipeline([LoadDelta("d")]).run(other, resources={"d": tmp_path / "one"})
    with pytest.raises(PassError, match=r"blocks.0 attention has no prefix"):
        bg.compile(alone, backend=Torch(generate=True))


@pytest.mark.slow
def test_an_engine_and_a_saved_program(prefixed: Program, tmp_path: Path) -> None:
    batch = tokens(4, 9, 6)
    prefixed.save(str(tmp_path / "program"))
    assert torch.equal(bg.load(tmp_path / "program")(**batch)["output"], prefixed(**batch)["output"])
    pytest.importorskip("onnxruntime")
    engine: Any = bg.compile(prefixed, backend=Onnx(generate=True))
    real = batch["attention_mask"].bool()
    found = torch.as_tensor(engine(**batch)["output"])
    assert relative_error(found[real], prefixed(**batch)["output"][real]) < 1e-4


def test_bad_input_is_refused(decoder: Program, tmp_path: Path) -> None:
    for options, message in (
        ({"tokens": 0}, "tokens=0"),
        ({"hidden": 3}, "hidden=3"),
        ({"init": "ones"}, "init"),
    ):
        with pytest.raises(InputError, match=message):
            Prefix(**options)  # type: ignore[arg-type]
    with pytest.raises(PassError, match=r"targets='block.9' fits no site"):
        bg.Pipeline([Prefix(targets="block.9")]).run(decoder)
    with pytest.raises(PassError, match="no attention of the model takes a prefix"):
        bg.Pipeline([Prefix()]).run(bg.capture(nn.Linear(4, 3), (torch.randn(3, 4),)))
    with pytest.raises(OrderError, match="on a program that is prompted"):
        bg.Pipeline([SoftPrompt(2), Prefix()]).run(decoder)
    known = decoder.clone()
    known.ranges["sequence"] = Range(1, 40)
    with pytest.raises(PassError, match="35 tokens leave 5 of the model's 40 positions"):
        bg.Pipeline([Prefix(35)]).run(known)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMPTED)
def test_outputs_gradients_and_files_equal_pefts(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    kind, task, output = PROMPTED[name]
    model, program = captured(name)
    batch = BY_NAME[name].example(3, 9)
    for projection in (False, True):
        config = peft.PrefixTuningConfig(
            num_virtual_tokens=TOKENS, task_type=task, prefix_projection=projection, encoder_hidden_size=7
        )
        theirs = getattr(peft, kind)(copy.deepcopy(model).eval(), config).eval()
        folder = tmp_path / f"theirs-{projection}"
        theirs.save_pretrained(folder)
        ours = bg.Pipeline([LoadDelta("d")]).run(program, resources={"d": folder})
        _compare(theirs, ours, batch, output, gradients=not projection)
    tuned = bg.Pipeline([Prefix(TOKENS)]).run(program)
    tuned.save_delta(str(tmp_path / "ours"))
    config = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    if name == "t5":  # PEFT has one prefix for two layers of a decoder of two: ours is one of each layer
        again = bg.Pipeline([LoadDelta("d")]).run(program, resources={"d": tmp_path / "ours"})
        assert torch.equal(again(**batch)[output], tuned(**batch)[output])
        ours.save_delta(str(tmp_path / "equal"))
        tuned, place = ours, tmp_path / "equal"
    else:
        place = tmp_path / "ours"
    loaded = getattr(peft, kind).from_pretrained(copy.deepcopy(model).eval(), place).eval()
    with torch.no_grad():
        assert relative_error(tuned(**batch)[output], loaded(**batch)[output]) < EXACT
    assert config.num_virtual_tokens == TOKENS


def _compare(
    theirs: Any, ours: Program, batch: dict[str, torch.Tensor], output: str, gradients: bool
) -> None:
    found = theirs(**batch)[output]
    assert relative_error(ours(**batch)[output], found.detach()) < EXACT
    if not gradients:
        return
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(9))
    (found * weights).sum().backward()
    (wanted,) = (item.grad for item in theirs.parameters() if item.requires_grad)
    module = trainable(ours)
    values = dict(
        zip((spec.name for spec in ours.outputs), module(*(batch[spec.name] for spec in ours.inputs)))
    )
    (values[output] * weights).sum().backward()
    mine = {name: item.grad for name, item in module.named_parameters() if item.requires_grad}
    layers = len(mine) // 2
    entries = torch.zeros(TOKENS, 2 * layers, wanted.shape[1] // (2 * layers))
    ordered = [mine[f"{path}.prefix_{which}"] for path in prefixes_of(ours) for which in ("key", "value")]
    places = [
        place for pair in places_in_peft(layers, output == "logits" and len(batch) == 3) for place in pair
    ]
    for place, item in zip(places, ordered):
        assert item is not None
        entries[:, place] += item[0].permute(1, 0, 2).flatten(1)
    assert relative_error(entries.flatten(1), wanted) < EXACT


UNFIT = {
    **dict.fromkeys(("mamba", "mamba2"), "no attention of the model takes a prefix, since it has none"),
    "deberta_v2": r"are not \[batch, heads, sequence, size\]",
    **dict.fromkeys(
        ("vit", "deit", "clip_vision", "dinov2", "wav2vec2", "hubert", "spectrogram"),
        "needs a dynamic length",
    ),
}
"""Architecture -> why it takes no prefix."""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_on_an_architecture(name: str) -> None:
    _, program = captured(name)
    if name in UNFIT:
        with pytest.raises(PassError, match=UNFIT[name]):
            bg.Pipeline([Prefix(TOKENS)]).run(program)
        return
    done = stirred(bg.Pipeline([Prefix(TOKENS)]).run(program))
    assert done.structure().roles == program.structure().roles
    module = done.module(training=True)
    values = module(*(done.example[spec.name] for spec in done.inputs))
    loss = sum(value.double().square().mean() for value in values if value.requires_grad)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    for key, item in module.named_parameters():
        assert (item.grad is not None and bool(item.grad.any())) == (key not in done.frozen), key


def test_25_architectures_take_a_prefix() -> None:
    assert len(NAMES) - len(UNFIT) >= 25
