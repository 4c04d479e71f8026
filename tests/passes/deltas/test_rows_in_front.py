"""Rows choose among soft prompts, or prefixes, of other lengths: each row is what its own alone gives, whatever its neighbours have."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import Onnx, Torch
from bmgraph.errors import InputError, MisplacedError, PassError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.pass_base import ModelPass
from bmgraph.passes import Deltas, LoadDelta, LoRA, Prefix, Quantize, SoftPrompt
from bmgraph.verify.metrics import relative_error
from tests.helpers.captured import captured
from tests.helpers.models import tiny_decoder, tiny_encoder, tokens
from tests.helpers.peft_models import EXACT, stirred
from tests.helpers.sweep import sweep
from tests.helpers.zoo import BY_NAME

ROWS = ["long", None, "short", "long"]
LENGTHS = {"short": 1, "long": 4}
KINDS: dict[str, type[SoftPrompt | Prefix]] = {"prompt": SoftPrompt, "prefix": Prefix}
END = 2
"""The id that ends a text, of the toy architectures."""

Batch = dict[str, torch.Tensor]


@cache
def decoder() -> Program:
    return bg.capture(tiny_decoder(layers=1), tokens())


@cache
def encoder() -> Program:
    return bg.capture(tiny_encoder(layers=1), tokens())


def saved(program: Program, kind: str, folder: Path, **more: ModelPass) -> dict[str, str]:
    """Folders of deltas with one and with four positions in front, and of others."""
    passes: dict[str, ModelPass] = {name: KINDS[kind](count) for name, count in LENGTHS.items()}
    for seed, (name, item) in enumerate((passes | more).items()):
        tuned = bg.Pipeline([item]).run(program, verify="off")
        stirred(tuned, seed=seed).save_delta(str(folder / name))
    return {name: str(folder / name) for name in passes | more}


@pytest.fixture(scope="module")
def folders_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders of deltas of the small models by kind, made once."""

    @cache
    def made(model: Any, kind: str) -> dict[str, str]:
        return saved(model(), kind, tmp_path_factory.mktemp(kind), other=KINDS[kind](2))

    return made


def alone(program: Program, folders: dict[str, str]) -> dict[str | None, Program]:
    """The program with each delta alone, and with none."""
    found: dict[str | None, Program] = {None: program}
    for name in folders:
        found[name] = bg.Pipeline([LoadDelta(name)]).run(program, resources=folders, verify="off")
    return found


def check(
    found: dict[str, torch.Tensor], programs: dict[str | None, Program], batch: Batch, bound: float = EXACT
) -> None:
    """Each row of all outputs must be that of the program of its delta, where its text is no padding."""
    real = batch["attention_mask"].bool()
    for row, name in enumerate(ROWS):
        for key, expected in programs[name](**batch).items():
            mine, theirs = found[key][row], expected[row]
            if expected.shape[:2] == real.shape:
                mine, theirs = mine[real[row]], theirs[real[row]]
            assert relative_error(mine, theirs) < bound, (key, row)


EACH = tuple((model, kind) for model in (decoder, encoder) for kind in KINDS)


@pytest.mark.parametrize(("model", "kind"), sweep(EACH, ((decoder, "prefix"), (encoder, "prompt"))))
def test_each_row_is_what_its_delta_gives(model: Any, kind: str, folders_of: Any, tmp_path: Path) -> None:
    program, batch, folders = model(), tokens(4, 9, 6), folders_of(model, kind)
    verify: Any = "off" if kind == "prompt" else "numeric"
    both = bg.Pipeline([Deltas(("short", "long"))]).run(program, resources=folders, verify=verify)
    found = both(**batch, delta=ROWS)
    check(found, alone(program, folders), batch)
    key = both.outputs[-1].name
    assert relative_error(found[key][0], both(**batch, delta="short")[key][0]) > 0.01
    tables = {name for name in both.parameters if "_deltas_" in name}
    assert len(tables) == (2 if kind == "prompt" else 3)
    assert both.frozen >= tables
    with pytest.raises(InputError, match="rows of the program choose among deltas of the family"):
        both.save_delta(str(tmp_path / "several"))


@pytest.mark.parametrize("kind", sweep(KINDS, ("prefix",)))
def test_each_row_generates_what_its_delta_gives(kind: str, folders_of: Any) -> None:
    program, folders = decoder(), folders_of(decoder, kind)
    engine: Any = bg.compile(
        program, [Deltas(("short", "long"))], backend=Torch(generate=True), resources=folders, verify="off"
    )
    prompts = [[3, 4, 5, 6], [7, 8], [9, 9, 2], [3]]
    found, programs = engine.generate(prompts, max_new_tokens=4, delta=ROWS), alone(program, folders)
    for name, prompt, row in zip(ROWS, prompts, found):
        check_ids(row, greedy(programs[name], prompt))


def check_ids(found: list[int], expected: list[int]) -> None:
    """Generation ends with the id that ends a text."""
    assert found == expected[: len(found)]
    assert len(found) == len(expected) or expected[len(found)] == END


def greedy(program: Program, prompt: list[int], key: str = "output", given: str = "ids") -> list[int]:
    ids = list(prompt)
    for _ in range(4):
        text = torch.tensor([ids])
        logits = program(**{given: text, "attention_mask": torch.ones_like(text)})[key]
        ids.append(int(logits[0, -1].argmax()))
    return ids[-4:]


@pytest.mark.parametrize("kind", sweep(KINDS, ("prompt",)))
def test_they_come_and_go_while_an_engine_runs(kind: str, folders_of: Any, tmp_path: Path) -> None:
    program, batch = encoder(), tokens(4, 9, 6)
    lora = bg.Pipeline([LoRA(r=2)]).run(program, verify="off")
    lora.save_delta(str(tmp_path / "lora"))
    folders = {**folders_of(encoder, kind), "lora": str(tmp_path / "lora")}
    engine: Any = bg.compile(
        program, [Deltas(("short",), capacity=2, tokens=3)], backend="torch", resources=folders, verify="off"
    )
    given = {"short": "short", "long": "other"}  # names -> what they stand for
    programs = alone(program, {name: folders[name] for name in ("short", "other")})
    engine.deltas.add("long", folders["other"])
    for again in (False, True):
        if again:
            engine.deltas.remove("long")
            engine.deltas.swap("short", folders["other"])
            engine.deltas.add("long", folders["short"])
            given = {"short": "other", "long": "short"}
        found = engine(**batch, delta=ROWS)
        check(found, {None: program, **{name: programs[own] for name, own in given.items()}}, batch)
    with pytest.raises(
        PassError,
        match=r"4 positions in front, and the tables have room for 3: compile with Deltas\(tokens=4\)",
    ):
        engine.deltas.swap("long", folders["long"])
    with pytest.raises(PassError, match="of the family 'lora', and the tables hold"):
        engine.deltas.swap("long", folders["lora"])


def test_what_cannot_be_chosen_is_refused(folders_of: Any, tmp_path: Path) -> None:
    program = decoder()
    folders = {**folders_of(decoder, "prompt"), "prefix": folders_of(decoder, "prefix")["long"]}
    for names, options, message in (
        (("short", "prefix"), {}, "prompt and prefix, which both take the positions in front of a text"),
        (("long",), {"tokens": 3}, "'long' has 4 positions in front: tokens=3 must be at least that"),
    ):
        with pytest.raises(PassError, match=message):
            bg.Pipeline([Deltas(names, **options)]).run(program, resources=folders)  # type: ignore[arg-type]

    class Unmasked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 3)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)[:, None]
            scores: torch.Tensor = self.head(nn.functional.scaled_dot_product_attention(x, x, x)[:, 0])
            return scores

    open_program = bg.capture(Unmasked().eval(), {"ids": torch.randint(9, (2, 6))})
    open_folders = saved(open_program, "prompt", tmp_path / "c")
    with pytest.raises(PassError, match="sees all positions, and the model takes no mask"):
        bg.Pipeline([Deltas(("short",))]).run(open_program, resources=open_folders)
    with pytest.raises(InputError, match="tokens=0: give a number of at least 1"):
        Deltas(("short",), tokens=0)


@pytest.mark.slow
def test_a_prefix_of_other_attentions_is_refused_by_an_engine(tmp_path: Path) -> None:
    program = bg.capture(tiny_encoder(layers=2), tokens())
    some = Prefix(2, targets=("blocks.0",))
    folders = saved(program, "prefix", tmp_path, some=some)
    engine: Any = bg.compile(program, [Deltas(("long",), capacity=2)], backend="torch", resources=folders)
    with pytest.raises(MisplacedError, match="a prefix of 1 attentions, and the tables are of 2"):
        engine.deltas.add("some", folders["some"])
    with pytest.raises(PassError, match=r"'some' has no prefix at blocks\.1, where others have one"):
        bg.Pipeline([Deltas(("long", "some"))]).run(program, resources=folders)


ARCHITECTURES = tuple((name, kind) for name in ("gpt2", "llama", "bert", "t5") for kind in KINDS)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), ARCHITECTURES)
@pytest.mark.parametrize("form", ["fp32", "int8", "onnx"])
def test_rows_choose_on_an_architecture(name: str, kind: str, form: str, tmp_path: Path) -> None:
    _, program = captured(name)
    if form == "int8":
        program = bg.Pipeline([Quantize("int8", activations="none", smallest=1)]).run(program)
    folders = saved(program, kind, tmp_path)
    programs, batch = alone(program, folders), BY_NAME[name].example(4, BY_NAME[name].lengths[1])
    both = bg.Pipeline([Deltas(("short", "long"))]).run(program, resources=folders)
    if form == "onnx":
        pytest.importorskip("onnxruntime")
        engine: Any = bg.compile(both, backend="onnx")
        check(engine(**batch, delta=ROWS), programs, batch, 1e-4)
    else:
        check(both(**batch, delta=ROWS), programs, batch)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "onnx"])
@pytest.mark.parametrize(("name", "kind"), sweep(ARCHITECTURES[:4], ()))
def test_rows_generate_on_an_architecture(name: str, kind: str, backend: str, tmp_path: Path) -> None:
    _, program = captured(name)
    folders = saved(program, kind, tmp_path)
    programs = alone(program, folders)
    made = Torch(generate=True) if backend == "torch" else Onnx(generate=True)
    engine: Any = bg.compile(
        program, [Deltas(("short", "long"), capacity=3)], backend=made, resources=folders
    )
    prompts = [[3, 4, 5, 6], [7, 8], [9, 9, 2], [3]]
    found = engine.generate(prompts, max_new_tokens=4, delta=ROWS)
    for key, prompt, row in zip(ROWS, prompts, found):
        check_ids(row, greedy(programs[key], prompt, "logits", "input_ids"))
    if kind == "prefix":  # what a prompt becomes in front of a cache, it becomes when it is compiled
        engine.deltas.add("again", folders["short"])
        (again,) = engine.generate(prompts[:1], max_new_tokens=4, delta="again")
        check_ids(again, greedy(programs["short"], prompts[0], "logits", "input_ids"))
    else:
        with pytest.raises(PassError, match="keeps keys and values that were computed of prompts"):
            engine.deltas.add("again", folders["short"])


@pytest.mark.slow
def test_an_encoders_prompts_are_chosen_where_a_decoder_writes(tmp_path: Path) -> None:
    """A prompt in front of an encoder's text stays there; a prefix of a decoder without a mask is refused in front of its cache."""
    _, program = captured("t5")
    folders, prompts = saved(program, "prompt", tmp_path / "prompt"), [[3, 4, 5, 6], [7, 8], [9, 9, 4], [3]]
    given: dict[str, Any] = {"max_new_tokens": 4, "start": 0, "eos": ()}
    made: dict[str, Any] = {"backend": Torch(generate=True), "verify": "off"}
    engine: Any = bg.compile(program, [Deltas(("short", "long"))], resources=folders, **made)
    found = engine.generate(prompts, delta=ROWS, **given)
    for name, one in alone(program, folders).items():
        expected = bg.compile(one, **made).generate(prompts, **given)
        assert [found[row] for row, own in enumerate(ROWS) if own == name] == [
            expected[row] for row, own in enumerate(ROWS) if own == name
        ]
    with pytest.raises(PassError, match="the decoder takes no mask that could hide the rest"):
        bg.compile(
            program,
            [Deltas(("short", "long"))],
            resources=saved(program, "prefix", tmp_path / "prefix"),
            **made,
        )
