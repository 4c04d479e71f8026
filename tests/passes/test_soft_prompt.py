"""SoftPrompt: equals a prompt concatenated to the embeddings by hand, returns only the text's outputs, and refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import BundleError, InputError, OrderError, PassError
from bmgraph.ir.program import Program
from bmgraph.ir.tensor_spec import Range
from bmgraph.passes import LoadDelta, LoRA, Quantize, SoftPrompt
from bmgraph.verify.metrics import relative_error
from tests.helpers.captured import NAMES, captured, eager_outputs
from tests.helpers.deltas import replay_in_a_fresh_process, trained
from tests.helpers.models import TinyEncoder, tokens
from tests.helpers.peft_models import PROMPTED
from tests.helpers.zoo import BY_NAME, Batch
from tests.passes.test_lora import EXACT

TOKENS = 5

QUICK = ("bert", "gpt2", "llama", "t5")

UNFIT = {
    "mamba": "is fixed to 12",
    "mamba2": "is fixed to 12",
    **dict.fromkeys(
        ("vit", "deit", "clip_vision", "dinov2", "wav2vec2", "hubert", "spectrogram"),
        "no input is looked up in an embedding",
    ),
}
"""Architecture -> why it supports no prompt."""


def prompted(program: Program, *passes: bg.Pass) -> Program:
    return trained(bg.Pipeline([*passes, SoftPrompt(TOKENS)]).run(program))


def prompt_of(program: Program) -> torch.Tensor:
    (found,) = (tensor for name, tensor in program.parameters.items() if name.endswith("_prompt"))
    return found


def longer(mask: torch.Tensor, value: int = 1) -> torch.Tensor:
    return torch.cat([torch.full((len(mask), TOKENS), value, dtype=mask.dtype), mask], 1)


class Positions(nn.Module):
    """Token embeddings and 16 learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.out = nn.Embedding(9, 8), nn.Embedding(16, 8), nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.words(ids) + self.places(torch.arange(ids.shape[1])))


def test_the_rewritten_graph_is_golden() -> None:
    program = bg.capture(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)), (torch.randint(0, 9, (2, 6)),))
    stamp = "  # site=0.weight part=prompt pass=softprompt{tokens=2}"
    assert str(bg.Pipeline([SoftPrompt(2)]).run(program)) == (
        "forward(input: i64[batch, sequence]):\n"
        "  %embedding = aten.embedding(0.weight, %input) : f32[batch, sequence, 4]  # site=0.weight pass=softprompt{tokens=2}\n"
        "  %sym_size = aten.sym_size.int(%input, 0) : batch  # part=prompt pass=softprompt{tokens=2}\n"
        f"  %expand = aten.expand(0.weight_prompt, [%sym_size, -1, -1]) : f32[batch, 2, 4]{stamp}\n"
        f"  %cat = aten.cat([%expand, %embedding], 1) : f32[batch, sequence + 2, 4]{stamp}\n"
        "  %linear = aten.linear(%cat, 1.weight, 1.bias) : f32[batch, sequence + 2, 3]\n"
        "  %slice = aten.slice.Tensor(%linear, 1, 2, 9223372036854775807) : f32[batch, sequence, 3]  # part=prompt pass=softprompt{tokens=2}\n"
        "  return output=%slice\n"
    )


def test_numbers_equal_the_naive_form(program: Program, model: TinyEncoder) -> None:
    done, batch = prompted(program), tokens(4, 9, 6)
    with torch.no_grad():
        x = torch.cat([prompt_of(done).expand(4, -1, -1), model.embed(batch["ids"])], 1)
        mask = longer(batch["attention_mask"]).bool()[:, None, None, :]
        for block in model.blocks:
            x = block(x, mask)
        expected = model.head(x)[:, TOKENS:]
    assert relative_error(done(**batch)["logits"], expected) < EXACT


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_architectures_equal_their_own_with_longer_embeddings(name: str) -> None:
    model, program = captured(name)
    if name in UNFIT:
        with pytest.raises(PassError, match=UNFIT[name]):
            bg.Pipeline([SoftPrompt(TOKENS)]).run(program)
        return
    done = prompted(program)
    assert done.structure().roles == program.structure().roles
    batch = BY_NAME[name].example(3, BY_NAME[name].lengths[1])
    if name == "whisper":  # no embeddings in place of ids: only runs it, at another size
        assert done(**batch).keys() == program(**batch).keys()
        return
    expected = eager_outputs(model.eval(), _naive(model, batch, prompt_of(done)), list(done(**batch)))
    for key, found in done(**batch).items():
        value = expected[key] if expected[key].shape == found.shape else expected[key][:, TOKENS:]
        real = batch["attention_mask"].bool() if "attention_mask" in batch else None
        if real is not None and found.shape[:2] == real.shape:
            found, value = found[real], value[real]
        assert relative_error(found, value) < 1e-4, key


def _naive(model: nn.Module, batch: Batch, prompt: torch.Tensor) -> Batch:
    words = model.get_input_embeddings()  # type: ignore[operator]
    scale = float(getattr(words, "embed_scale", 1.0))  # some scale embeddings, here after the prompt is added
    with torch.no_grad():
        embeddings = torch.cat(
            [prompt.expand(len(batch["input_ids"]), -1, -1) * scale, words(batch["input_ids"])], 1
        )
    beside = {key: value for key, value in batch.items() if key != "input_ids"}
    return {**beside, "attention_mask": longer(batch["attention_mask"]), "inputs_embeds": embeddings}


def test_the_loss_ignores_the_prompt() -> None:
    model = BY_NAME["llama"].build().eval()
    batch = BY_NAME["llama"].example(2, 12)
    batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    done = prompted(bg.capture(model, batch))
    assert done.losses == ("loss",)
    naive = _naive(model, {**batch, "labels": longer(batch["labels"], -100)}, prompt_of(done))
    with torch.no_grad():
        expected = model(**naive)
    assert relative_error(done(**batch)["loss"], expected.loss) < EXACT


def test_the_prompt_alone_learns_beside_deltas(program: Program) -> None:
    for passes in ([SoftPrompt(TOKENS)], [LoRA(), SoftPrompt(TOKENS)], [SoftPrompt(TOKENS), LoRA()]):
        done = bg.Pipeline(passes).run(program)
        free = set(done.parameters) - done.frozen
        assert {name for name in free if "_lora_" not in name} == {"embed.weight_prompt"}
        assert len(free) == (1 if len(passes) == 1 else 9)
    module = done.module(training=True)
    sum(value.sum() for value in module(*tokens().values())).backward()  # type: ignore[union-attr]
    gradient = dict(module.named_parameters())["embed.weight_prompt"].grad
    assert gradient is not None
    assert bool(gradient.any(-1).all())


def test_it_begins_as_words_drawn_by_its_seed(program: Program) -> None:
    first, again, other = (
        prompt_of(bg.Pipeline([SoftPrompt(TOKENS, seed=seed)]).run(program)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    words = program.parameters["embed.weight"]
    assert all(bool((words == row).all(-1).any()) for row in first[0])


def test_the_longest_text_is_shorter() -> None:
    program = bg.capture(Positions(), {"ids": torch.randint(0, 9, (2, 6))})
    program.ranges["sequence"] = Range(1, 16)
    done = bg.Pipeline([SoftPrompt(TOKENS)]).run(program)
    assert done(ids=torch.randint(0, 9, (2, 11)))["output"].shape == (2, 11, 3)
    with pytest.raises(InputError, match="takes 1 to 11"):
        done(ids=torch.randint(0, 9, (2, 12)))
    with pytest.raises(
        PassError, match=r"11 tokens leave 5 of the model's 16 positions, fewer than the example needs \(6"
    ):
        bg.Pipeline([SoftPrompt(11)]).run(program)


def test_operators_with_unknown_effect_on_inserted_positions_are_refused() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(9, 4), nn.Embedding(8, 4)

        def forward(
            self, ids: torch.Tensor, weights: torch.Tensor | None = None, places: torch.Tensor | None = None
        ) -> torch.Tensor:
            x = self.words(ids)
            x = x if weights is None else x * weights[..., None]
            return x if places is None else x + self.places(places)

    ids = torch.randint(0, 9, (2, 6))
    for name, given, message in (
        ("weights", torch.rand(2, 6), "the values of input 'weights' at inserted positions are not known"),
        ("places", torch.arange(6).expand(2, 6), "input 'places' numbers the positions"),
    ):
        with pytest.raises(PassError, match=message):
            bg.Pipeline([SoftPrompt(2)]).run(bg.capture(Beside(), {"ids": ids, name: given}))
    mixed = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(0, 1), nn.Linear(4, 3))
    with pytest.raises(PassError, match=r"output .* became .*: its positions of the text are not known"):
        bg.Pipeline([SoftPrompt(2)]).run(bg.capture(mixed, (ids,)))


class Numbered(nn.Module):
    """Places are counted from the ids that are not padding (1), and a mark is looked up for one special id (4)."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(9, 4), nn.Embedding(30, 4), nn.Linear(4, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        real = ids.ne(1).long()
        x = self.words(ids) * (ids != 4).float()[..., None] + self.places(real.cumsum(1) * real + 1)
        weights = (x @ x.transpose(1, 2)).masked_fill(real[:, None] == 0, -1e9).softmax(-1)
        return self.head(weights @ x)


@pytest.mark.parametrize("first", [1, 4])
def test_ids_of_the_prompt_are_neither_padding_nor_special(first: int) -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[2, 3, 5, 6, 7], [8, 7, 5, 3, 2]])
    ids[:, 0] = first
    done = prompted(bg.capture(Numbered().eval(), {"ids": ids}))
    found = done(ids=ids)["output"]
    if first == 1:  # padding in front is as if it were not there
        assert relative_error(found[:, 1:], done(ids=ids[:, 1:])["output"]) < EXACT
    words, places, head = (done.parameters[f"{name}.weight"] for name in ("words", "places", "head"))
    real = longer(ids.ne(1).long())
    x = (
        torch.cat([prompt_of(done).expand(2, -1, -1), words[ids]], 1)
        * (longer(ids, 0) != 4).float()[..., None]
    )
    x = x + places[real.cumsum(1) * real + 1]
    x = (x @ x.transpose(1, 2)).masked_fill(real[:, None] == 0, -1e9).softmax(-1) @ x
    expected = nn.functional.linear(x, head, done.parameters["head.bias"])[:, TOKENS:]
    assert relative_error(found, expected) < EXACT


class Hides(nn.Module):
    """Attention over ids, with a mask whose ones hide."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(self.mixed(self.words(ids), hidden))

    @staticmethod
    def mixed(x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(-1, (2, 2)).transpose(1, 2)
        seen = ~hidden.bool()[:, None, None, :]
        return (
            nn.functional.scaled_dot_product_attention(heads, heads, heads, seen).transpose(1, 2).flatten(2)
        )


def test_a_mask_whose_ones_hide_shows_the_prompt() -> None:
    torch.manual_seed(0)
    model, ids, hidden = (
        Hides().eval(),
        torch.tensor([[2, 3, 5], [8, 7, 1]]),
        torch.tensor([[0, 0, 0], [0, 0, 1]]),
    )
    done = prompted(bg.capture(model, {"ids": ids, "hidden": hidden}))
    x = torch.cat([prompt_of(done).expand(2, -1, -1), model.words(ids)], 1)
    with torch.no_grad():
        expected = model.head(model.mixed(x, longer(hidden, 0)))[:, TOKENS:]
    assert relative_error(done(ids=ids, hidden=hidden)["output"], expected) < EXACT


def test_positions_behind_padding_and_inputs_of_losses_are_told() -> None:
    class Beside(nn.Module):
        def __init__(self, form: str) -> None:
            super().__init__()
            self.words, self.beside, self.head = nn.Embedding(9, 4), nn.Embedding(8, 4), nn.Linear(4, 5)
            self.form = form

        def forward(self, ids: torch.Tensor, other: torch.Tensor) -> dict[str, torch.Tensor]:
            x = self.words(ids)
            if self.form == "places":
                return {"scores": self.head(x + self.beside(other))}
            scores = self.head(x)
            if self.form == "weights":
                loss = (scores.square().sum(-1) * other).sum() / other.sum()
            else:
                flat, labels = scores.flatten(0, 1), other.flatten()
                loss = nn.functional.cross_entropy(flat, labels, ignore_index=3)
                loss = loss + nn.functional.cross_entropy(2 * flat, labels, ignore_index=4)
            return {"loss": loss, "scores": scores}

    ids, mask = torch.randint(0, 9, (2, 6)), torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    for form, other, message in (
        ("places", (mask.cumsum(1) - 1).clamp(min=0), r"input 'other' numbers the positions.*\(8 rows for 6"),
        ("weights", mask.float(), "only a loss reads it"),
        ("two losses", mask, r"its losses skip different labels \(3.0, 4.0\)"),
    ):
        with pytest.raises(PassError, match=message):
            bg.Pipeline([SoftPrompt(2)]).run(bg.capture(Beside(form), {"ids": ids, "other": other}))


def test_wrong_options_and_programs_are_refused(program: Program, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tokens=0"):
        SoftPrompt(0)
    with pytest.raises(PassError, match="no input is looked up"):
        bg.Pipeline([SoftPrompt()]).run(bg.capture(nn.Linear(4, 3), (torch.randn(3, 4),)))
    with pytest.raises(OrderError, match="cannot run on a program that is prompted"):
        bg.Pipeline([SoftPrompt(), SoftPrompt()]).run(program)
    with pytest.raises(InputError, match="deltas of the families lora and prompt"):
        prompted(program, LoRA()).save_delta(str(tmp_path / "delta"))
    with pytest.raises(PassError, match="holds the id 50, and the model's embeddings have 50 rows"):
        bg.Pipeline([SoftPrompt(2, words=(50,))]).run(program)


def test_saved_loaded_replayed_and_lowered(program: Program, tmp_path: Path) -> None:
    bg.Pipeline([SoftPrompt(TOKENS, seed=4)]).run(program).save(str(tmp_path / "fresh"))
    replay_in_a_fresh_process(
        tmp_path / "fresh", "from tests.helpers.models import tiny_encoder", "tiny_encoder()"
    )
    done, batch = prompted(program), tokens(4, 9, 6)
    done.save(str(tmp_path / "prompted"))
    loaded = bg.load(tmp_path / "prompted")
    assert str(loaded) == str(done)
    assert torch.equal(loaded(**batch)["logits"], done(**batch)["logits"])
    pytest.importorskip("onnxruntime")
    engine = bg.compile(loaded, [Quantize("int8", activations="none")], backend="onnx")
    small = bg.Pipeline([Quantize("int8", activations="none")]).run(done)
    assert relative_error(engine(**batch)["logits"], small(**batch)["logits"]) < 1e-3


def test_a_meta_program_takes_a_prompt_without_weights(program: Program) -> None:
    done = bg.Pipeline([SoftPrompt(TOKENS)]).run(program.to("meta"))
    assert prompt_of(done).shape == (1, TOKENS, 32)


def test_it_begins_as_a_text_and_is_saved_with_modules_that_train_whole(
    program: Program, tmp_path: Path
) -> None:
    fresh = bg.Pipeline([SoftPrompt(TOKENS, words=(7, 3, 9), modules_to_save="head")]).run(program)
    words = program.parameters["embed.weight"]
    assert torch.equal(prompt_of(fresh)[0], words[[7, 3, 9, 7, 3]])
    done, batch = trained(fresh), tokens(4, 9, 6)
    assert done.trained_whole == {"head.weight", "head.bias"}
    done.save_delta(str(tmp_path / "prompt"))
    loaded = bg.Pipeline([LoadDelta("d")]).run(program, resources={"d": tmp_path / "prompt"})
    assert torch.equal(loaded(**batch)["logits"], done(**batch)["logits"])
    assert loaded.frozen == done.frozen


def test_a_prompt_that_a_network_of_peft_made_is_what_it_made(program: Program, tmp_path: Path) -> None:
    tuned = prompted(program)
    tuned.save_delta(str(tmp_path / "d"))
    (tmp_path / "d" / "manifest.json").unlink()  # as PEFT writes it
    config = json.loads((tmp_path / "d" / "adapter_config.json").read_text()) | {
        "peft_type": "P_TUNING", "encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 16, "encoder_num_layers": 2,
        "encoder_dropout": 0.1,
    }  # fmt: skip
    del config["prompt_tuning_init"]
    (tmp_path / "d" / "adapter_config.json").write_text(json.dumps(config))
    loaded = bg.Pipeline([LoadDelta("d")]).run(program, resources={"d": tmp_path / "d"})
    assert torch.equal(loaded(**tokens())["logits"], tuned(**tokens())["logits"])
    (tmp_path / "d" / "adapter_config.json").write_text(json.dumps(config | {"encoder_gate": 3}))
    with pytest.raises(BundleError, match="encoder_gate=3, an option that is not known here"):
        bg.Pipeline([LoadDelta("d")]).run(program, resources={"d": tmp_path / "d"})


@pytest.mark.slow
@pytest.mark.parametrize("network", ["MLP", "LSTM"])
@pytest.mark.parametrize("name", PROMPTED)
def test_prompts_of_pefts_networks_are_read_and_served(name: str, network: str, tmp_path: Path) -> None:
    """What PEFT's P-tuning trained is loaded here, and what is saved here it serves."""
    peft = pytest.importorskip("peft")
    kind, task, output = PROMPTED[name]
    model, program = captured(name)
    batch = BY_NAME[name].example(3, 9)
    config = peft.PromptEncoderConfig(
        num_virtual_tokens=TOKENS,
        task_type=task,
        encoder_hidden_size=16,
        encoder_reparameterization_type=network,
    )
    theirs = getattr(peft, kind)(copy.deepcopy(model).eval(), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = bg.Pipeline([LoadDelta("d")]).run(program, resources={"d": tmp_path / "theirs"})
    ours.save_delta(str(tmp_path / "ours"))
    again = getattr(peft, kind).from_pretrained(copy.deepcopy(model).eval(), tmp_path / "ours").eval()
    for one in (theirs, again):
        with torch.no_grad():
            found = one(**batch)[output]
        assert relative_error(ours(**batch)[output], found if name == "t5" else found[:, TOKENS:]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMPTED)
def test_outputs_gradients_and_files_equal_pefts(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    kind, task, output = PROMPTED[name]
    model, program = captured(name)
    batch = BY_NAME[name].example(3, 9)
    config = peft.PromptTuningConfig(num_virtual_tokens=TOKENS, task_type=task)
    theirs = getattr(peft, kind)(copy.deepcopy(model).eval(), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = bg.Pipeline([LoadDelta("d")]).run(program, resources={"d": tmp_path / "theirs"})
    found = theirs(**batch)[output]
    own = found if name == "t5" else found[:, TOKENS:]  # which puts the prompt in front of its encoder's text
    assert relative_error(ours(**batch)[output], own.detach()) < 1e-5
    weights = torch.randn(own.shape, generator=torch.Generator().manual_seed(9))
    (own * weights).sum().backward()
    (wanted,) = (item.grad for item in theirs.parameters() if item.requires_grad)
    module = ours.module()
    for key, item in module.named_parameters():
        item.requires_grad_(key not in ours.frozen)
    values = dict(
        zip((spec.name for spec in ours.outputs), module(*(batch[spec.name] for spec in ours.inputs)))
    )
    (values[output] * weights).sum().backward()
    (mine,) = (item.grad for item in module.parameters() if item.requires_grad)
    assert mine is not None
    assert relative_error(mine[0], wanted[:TOKENS]) < 1e-5
    tuned = prompted(program)
    tuned.save_delta(str(tmp_path / "ours"))
    loaded = getattr(peft, kind).from_pretrained(copy.deepcopy(model).eval(), tmp_path / "ours").eval()
    with torch.no_grad():
        found = loaded(**batch)[output]
    assert relative_error(tuned(**batch)[output], found if name == "t5" else found[:, TOKENS:]) < 1e-5
