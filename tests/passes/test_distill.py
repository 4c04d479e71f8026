"""Distill: the loss curve equals a plain eager loop's, for any teacher and number of ranks; the result is a usual program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
import bmgraph.pipeline
from bmgraph.analysis.structure.residual_stream import hidden_states
from bmgraph.backends import SGD, AdamW, Torch
from bmgraph.errors import InputError, PassError, ResourceError
from bmgraph.ir.program import Program, output_node
from bmgraph.passes import Deltas, Distill, LoRA, Quantize, SoftPrompt, ZeRO
from tests.helpers.captured import captured
from tests.helpers.models import TinyEncoder, tiny_encoder, tokens
from tests.helpers.ranks import run_ranks
from tests.helpers.recorded_losses import recorded_losses
from tests.helpers.training import labelled
from tests.helpers.zoo import BY_NAME, LLAMA_LIKE, Batch, _build
from tests.passes.test_per_row_deltas import two_deltas

STEPS, RATE = 20, 1e-3


def decoder(layers: int, hidden: int = 32) -> nn.Module:
    """A toy decoder of a given depth and width."""
    options = {**LLAMA_LIKE, "num_hidden_layers": layers, "hidden_size": hidden}
    return _build("LlamaForCausalLM", "LlamaConfig", **options)


def texts() -> list[Batch]:
    """Fewer batches than steps, of varying lengths, with padded rows."""
    return [BY_NAME["llama"].example(5, 9 + 2 * index) for index in range(3)]


def mean_divergence(student: nn.Module, teacher: nn.Module, batch: Batch) -> torch.Tensor:
    """KL divergence over tokens that are not padding, at temperature 2."""
    with torch.no_grad():
        wanted = teacher(**batch)["logits"]
    each = nn.functional.kl_div(
        (student(**batch)["logits"] / 2).log_softmax(-1), (wanted / 2).softmax(-1), reduction="none"
    )
    mask = batch["attention_mask"]
    return 4 * (each.sum(-1) * mask).sum() / mask.sum()


def mean_squares(student: nn.Module, teacher: nn.Module, batch: Batch) -> torch.Tensor:
    """The mean squared distance of hidden states after layers (0, 1) and (1, 2), averaged over both pairs."""

    def states(model: nn.Module) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda _, __, out: seen.append(out)) for layer in model.model.layers
        ]
        model(**batch)
        for hook in hooks:
            hook.remove()
        return seen

    with torch.no_grad():
        wanted = states(teacher)
    found = states(student)
    mask = batch["attention_mask"]
    sums = [((found[one] - wanted[other]).square().mean(-1) * mask).sum() for one, other in ((0, 1), (1, 2))]
    return sum(sums) / (2 * mask.sum())


def naive_curve(
    loss: Callable[[nn.Module, nn.Module, Batch], torch.Tensor],
    steps: int = STEPS,
    given: list[Batch] | None = None,
) -> list[float]:
    given = given or texts()
    student, teacher = decoder(2).train(), decoder(3).eval()
    rule = torch.optim.AdamW(student.parameters(), lr=RATE)
    curve = []
    for step in range(steps):
        rule.zero_grad()
        value = loss(student, teacher, given[step % len(given)])
        value.backward()
        rule.step()
        curve.append(value.item())
    return curve


def mixed(student: nn.Module, teacher: nn.Module, batch: Batch) -> torch.Tensor:
    """Divergence and cosine by their weights, with a quarter of the student's own loss."""
    with torch.no_grad():
        wanted = teacher(**batch)["logits"]
    found, mask = student(**batch), batch["attention_mask"]
    angles = 1 - nn.functional.cosine_similarity(found["logits"], wanted, -1)
    soft = mean_divergence(student, teacher, batch) + 0.5 * (angles * mask).sum() / mask.sum()
    return 0.75 * soft + 0.25 * found["loss"]


LESSONS = {
    "logits": (Distill(steps=STEPS, temperature=2.0), mean_divergence),
    "hidden": (Distill(steps=STEPS, on="hidden"), mean_squares),
}


def saved(folder: Path) -> tuple[str, str]:
    """The paths of the saved student and teacher, captured once for all ranks."""
    places = str(folder / "student"), str(folder / "teacher")
    for layers, place in zip((2, 3), places):
        bg.capture(decoder(layers), texts()[0]).save(place)
    return places


def _curve(
    rank: int, what: str, places: tuple[str, str], passes: tuple[ZeRO, ...] = (ZeRO(3),)
) -> list[float]:
    """The losses of a distillation, recorded where the pass reads them."""
    program, other = (bg.load(place) for place in places)
    with recorded_losses() as curve:
        resources = {
            "teacher": other,
            "text": texts(),
            "trainer": Torch(optimizer=AdamW(lr=RATE, no_decay=False), passes=passes),
        }
        done = bg.Pipeline([LESSONS[what][0]]).run(program, resources=resources)
    assert done.inputs == program.inputs
    assert done.outputs == program.outputs
    assert list(done.parameters) == list(program.parameters)
    return curve


@pytest.mark.slow
@pytest.mark.parametrize("what", ["logits", "hidden"])
def test_the_curve_of_a_plain_loop_on_two_ranks(what: str, tmp_path: Path) -> None:
    expected = naive_curve(LESSONS[what][1])
    for curve in run_ranks(2, _curve, what, saved(tmp_path)):
        assert curve == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < 0.95 * expected[0]


@pytest.mark.slow
def test_the_curve_of_hidden_states_on_one_rank(tmp_path: Path) -> None:
    assert _curve(0, "hidden", saved(tmp_path), ()) == pytest.approx(naive_curve(mean_squares), abs=1e-5)


@pytest.mark.slow
def test_the_curve_of_several_objectives_and_hard_labels() -> None:
    given = [labelled("llama", 5, 9 + 2 * index, seed=index) for index in range(2)]
    item = Distill(steps=5, temperature=2.0, on=("logits", "cosine"), weights=(1.0, 0.5), hard=0.25)
    program, other = (bg.capture(decoder(layers), given[0]) for layers in (2, 3))
    resources = {"teacher": other, "text": given, "trainer": Torch(optimizer=AdamW(lr=RATE, no_decay=False))}
    with recorded_losses() as curve:
        done = bg.Pipeline([item]).run(program, resources=resources)
    assert curve == pytest.approx(naive_curve(mixed, 5, given), abs=1e-5)
    assert (
        done.history[-1].text
        == "distill{steps=5,on=[logits,cosine],temperature=2.0,hard=0.25,weights=[1.0,0.5]}"
    )


@pytest.mark.slow
def test_a_teacher_of_another_architecture() -> None:
    other = BY_NAME["gpt2"].build()
    program = bg.capture(decoder(2), texts()[0])
    for on, sites in (("logits", ["logits"]), ("hidden", ["layer 0", "layer 1"])):
        item = Distill(steps=30, on=on)
        done = bg.Pipeline([item]).run(program, resources={"teacher": other, "text": texts()})
        assert [edit.site for edit in done.history[-1].edits] == sites
        words = done.history[-1].edits[0].what.split()
        assert float(words[-1]) < float(words[-3])


@cache
def student() -> Program:
    return bg.capture(tiny_encoder(1), tokens())


@cache
def teacher() -> Program:
    return bg.capture(tiny_encoder(2, layers=4), tokens())


def data() -> list[Batch]:
    return [tokens(4, 8, seed) for seed in range(4)]


def distilled(item: Distill, program: Program | None = None, **resources: Any) -> Program:
    given = {"teacher": teacher(), "text": data(), **resources}
    return bg.Pipeline([item]).run(program or student(), resources=given)


def distance(program: Program, wanted: Any, output: str) -> float:
    batch = tokens(5, 7, seed=9)
    return float((program(**batch)[output] - wanted(**batch)[output]).square().mean())


@pytest.mark.parametrize("on", ["logits", pytest.param("layerwise", marks=pytest.mark.slow)])
def test_a_teacher_in_half_precision(on: str) -> None:
    half = bg.capture(tiny_encoder(2).to(torch.bfloat16), tokens())
    done = distilled(Distill(steps=4, on=on), teacher=half)
    assert done.parameters.keys() == student().parameters.keys()
    assert {tensor.dtype for tensor in done.parameters.values()} == {torch.float32}


@pytest.mark.parametrize(
    "on", ["logits", *(pytest.param(name, marks=pytest.mark.slow) for name in ("outputs", "hidden"))]
)
def test_the_student_comes_nearer(on: str) -> None:
    done = distilled(Distill(steps=30, on=on))
    output = "logits" if on == "logits" else "hidden"
    assert distance(done, teacher(), output) < 0.97 * distance(student(), teacher(), output)
    assert done.structure().roles == student().structure().roles
    assert str(done) == str(student())
    record = done.history[-1]
    assert record.effect == "intended"
    assert len(record.edits) == {"logits": 1, "outputs": 2, "hidden": 2}[on]
    assert record.edits[0].what.startswith("trained on the teacher's")


GOLDEN = """\
forward(input: f32[batch, 4], teacher_0: f32[batch, 2]):
  %linear = aten.linear(%input, weight, bias) : f32[batch, 3]
  %linear_1 = aten.linear(%linear, teacher_projection_0) : f32[batch, 2]  # pass=distill{steps=2,on=outputs}
  %sub = aten.sub.Tensor(%linear_1, %teacher_0) : f32[batch, 2]  # pass=distill{steps=2,on=outputs}
  %mul = aten.mul.Tensor(%sub, %sub) : f32[batch, 2]  # pass=distill{steps=2,on=outputs}
  %mean = aten.mean.dim(%mul, [-1]) : f32[batch]  # pass=distill{steps=2,on=outputs}
  %ones_like = aten.ones_like(%mean) : f32[batch]  # pass=distill{steps=2,on=outputs}
  %mul_1 = aten.mul.Tensor(%mean, %ones_like) : f32[batch]  # pass=distill{steps=2,on=outputs}
  %sum = aten.sum(%mul_1) : f32[]  # pass=distill{steps=2,on=outputs}
  %sum_1 = aten.sum(%ones_like) : f32[]  # pass=distill{steps=2,on=outputs}
  %stack = aten.stack([%sum]) : f32[1]  # pass=distill{steps=2,on=outputs}
  %sum_2 = aten.sum(%stack) : f32[]  # pass=distill{steps=2,on=outputs}
  %stack_1 = aten.stack([%sum_1]) : f32[1]  # pass=distill{steps=2,on=outputs}
  %sum_3 = aten.sum(%stack_1) : f32[]  # pass=distill{steps=2,on=outputs}
  %div = aten.div.Tensor(%sum_2, %sum_3) : f32[]  # pass=distill{steps=2,on=outputs}
  return loss=%div
"""


def test_golden() -> None:
    """The objective: the program's output, projected to the teacher's width by a trained matrix, against the teacher's."""
    seen: list[str] = []
    train = bmgraph.pipeline.train_in_pass

    def watched(given: object, program: Program, *rest: Any) -> Any:
        seen.append(str(program))
        return train(given, program, *rest)

    program = bg.capture(nn.Linear(4, 3), {"input": torch.randn(5, 4)})
    other = bg.capture(nn.Linear(4, 2), {"input": torch.randn(5, 4)})
    bmgraph.pipeline.train_in_pass = watched
    try:
        given = {"teacher": other, "text": [{"input": torch.randn(6, 4)}]}
        done = bg.Pipeline([Distill(steps=2, on="outputs")]).run(program, resources=given)
    finally:
        bmgraph.pipeline.train_in_pass = train
    assert seen == [GOLDEN]
    assert list(done.parameters) == ["weight", "bias"]


@pytest.mark.slow
def test_layers_are_paired_by_hand() -> None:
    record = distilled(Distill(steps=2, on="hidden", layers=((0, 0), (1, 2)))).history[-1]
    assert [edit.site for edit in record.edits] == ["layer 0", "layer 1"]
    assert record.text == "distill{steps=2,on=hidden,layers=[[0,0],[1,2]]}"


@pytest.mark.slow
def test_widths_that_differ_get_a_projection() -> None:
    wide = bg.capture(tiny_encoder(2, width=48, layers=3), tokens())
    done = distilled(Distill(steps=10, on="hidden"), teacher=wide)
    assert list(done.parameters) == list(student().parameters)
    assert float(done.history[-1].edits[0].what.split()[-1]) < float(
        done.history[-1].edits[0].what.split()[-3]
    )


@pytest.mark.slow
def test_a_prompt_learns_behind_the_positions_that_it_inserts() -> None:
    item = SoftPrompt(tokens=4)
    prompted = bg.Pipeline([item]).run(student())
    done = distilled(Distill(steps=30, on="hidden"), prompted)
    changed = {
        name for name in done.parameters if not torch.equal(done.parameters[name], prompted.parameters[name])
    }
    assert changed == prompted.parameters.keys() - prompted.frozen
    losses = [float(part) for part in done.history[-1].edits[0].what.split("loss ")[1].split(" -> ")]
    assert losses[1] < losses[0]
    assert done(**tokens())["hidden"].shape == student()(**tokens())["hidden"].shape


@pytest.mark.slow
def test_rows_that_choose_deltas_take_all_of_them_in_turn(tmp_path: Path) -> None:
    folders = two_deltas(student(), tmp_path)
    chosen = bg.Pipeline([Deltas(tuple(folders))]).run(student(), resources=folders)
    done = distilled(Distill(steps=3), chosen)
    assert not torch.equal(done.parameters["head.weight"], chosen.parameters["head.weight"])


@pytest.mark.slow
def test_only_what_is_not_frozen_learns() -> None:
    adapted = bg.Pipeline([Quantize("int8", activations="none"), LoRA(r=4)]).run(student())
    done = distilled(Distill(steps=5), adapted)
    moved = {n for n, t in done.parameters.items() if not torch.equal(t, adapted.parameters[n])}
    assert moved == set(adapted.parameters) - adapted.frozen
    assert done.fingerprint == adapted.fingerprint


def test_what_trains_whole_but_is_not_read_by_the_loss_stays() -> None:
    adapted = bg.Pipeline([LoRA(r=2, modules_to_save=("head",))]).run(student())
    done = distilled(Distill(steps=1, on="hidden"), adapted)
    moved = {n for n, t in done.parameters.items() if not torch.equal(t, adapted.parameters[n])}
    assert moved
    assert all("lora" in name for name in moved)
    assert done.trained_whole == adapted.trained_whole == {"head.weight", "head.bias"}


@pytest.mark.slow
def test_models_and_engines_teach_what_their_programs_do() -> None:
    trainer = Torch(optimizer=SGD(lr=0.1))
    expected = distilled(Distill(steps=3), trainer=trainer).parameters
    model, engine = tiny_encoder(2, layers=4), bg.compile(teacher(), backend="onnx")
    by_model = distilled(Distill(steps=3), teacher=model, trainer=trainer).parameters
    by_engine = distilled(Distill(steps=3), teacher=engine, trainer=trainer).parameters
    for name, tensor in expected.items():
        assert torch.allclose(by_model[name], tensor, atol=1e-6)
        assert torch.allclose(by_engine[name], tensor, atol=1e-4)


@pytest.mark.slow
def test_history_is_replayed_to_the_same_weights(tmp_path: Path) -> None:
    trainer = Torch(optimizer=AdamW(lr=1e-2), passes=(ZeRO(3),))
    done = distilled(Distill(steps=3), trainer=trainer)
    done.save(str(tmp_path / "done"))
    given = {"teacher": teacher(), "text": data(), "trainer": trainer}
    again = bg.replay(tmp_path / "done", student(), resources=given)
    assert all(torch.equal(tensor, again.parameters[name]) for name, tensor in done.parameters.items())
    with pytest.raises(ResourceError, match="resource 'text' is not the one"):
        bg.replay(tmp_path / "done", student(), resources={**given, "text": data()[1:]})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "other"), [("teacher", student), ("trainer", lambda: Torch(optimizer=AdamW(lr=1e-3)))]
)
def test_other_resources_are_no_replay(tmp_path: Path, name: str, other: Callable[[], Any]) -> None:
    given = {"trainer": Torch(optimizer=AdamW(lr=1e-2))}
    distilled(Distill(steps=2), **given).save(str(tmp_path / "done"))
    with pytest.raises(ResourceError, match=f"resource '{name}' is not the one"):
        bg.replay(
            tmp_path / "done",
            student(),
            resources={"teacher": teacher(), "text": data(), **given, name: other()},
        )


@pytest.mark.slow
def test_what_was_distilled_becomes_an_engine() -> None:
    engine = bg.compile(
        student(), passes=[Distill(steps=2)], backend="onnx", resources={"teacher": teacher(), "text": data()}
    )
    assert [spec.name for spec in engine.inputs] == ["ids", "attention_mask"]


class Pooled(nn.Module):
    """A model without logits."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TinyEncoder()

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """ids, attention_mask i64[B, S] -> pooled f[B, 24]."""
        return {"pooled": self.inner(ids, attention_mask)["logits"].mean(1)}


def test_bad_input_is_refused() -> None:
    pooled = bg.capture(Pooled(), tokens())
    with pytest.raises(
        PassError,
        match="nothing to distill on logits: the outputs of the program are hidden, logits, of the teacher pooled",
    ):
        distilled(Distill(steps=1), teacher=pooled)
    few = student().clone()
    with few.edit() as editor:
        (logits,) = [node for node in output_node(few.graph).args[0] if node.meta["val"].shape[-1] == 24]
        first = editor.call(torch.ops.aten.slice.Tensor, logits, 2, 0, 7, like=logits, after=logits)
        editor.replace(logits, first)
    few.outputs = (few.outputs[0], replace(few.outputs[1], shape=(*few.outputs[1].shape[:2], 7)))
    with pytest.raises(PassError, match="the teacher's logits are over 7 classes, the program's over 24"):
        distilled(Distill(steps=1), teacher=few)
    with pytest.raises(
        PassError, match=r"layers=\(0, 9\): the program's layers are 0 to 1, the teacher's 0 to 3"
    ):
        distilled(Distill(steps=1, on="hidden", layers=((0, 9),)))
    with pytest.raises(PassError, match="an engine does not expose hidden states"):
        distilled(Distill(steps=1, on="hidden"), teacher=bg.compile(teacher(), backend="onnx"))
    with pytest.raises(ResourceError, match=r"lacks input 'attention_mask' of the teacher: it has ids"):
        distilled(Distill(steps=1), text=[{"ids": tokens()["ids"]}])
    with pytest.raises(ResourceError, match="the teacher is a list"):
        distilled(Distill(steps=1), teacher=[1])
    with pytest.raises(ResourceError, match="needs the resource 'teacher'"):
        bg.Pipeline([Distill(steps=1)]).run(student(), resources={"text": data()})
    with pytest.raises(ResourceError, match="which does not train"):
        distilled(Distill(steps=1), trainer=Torch())
    with pytest.raises(PassError, match=r"hard=0\.5 is the share of the program's own loss, and it has none"):
        distilled(Distill(steps=1, hard=0.5))
    for options, message in (
        ({"on": "weights"}, "on='weights': choose one of logits, outputs, hidden, cosine"),
        ({"on": ("logits", "logits")}, "or several, each once"),
        (
            {"on": ("logits", "hidden"), "weights": (1.0,)},
            r"weights=\(1\.0,\): give one positive number for each",
        ),
        ({"hard": 1.0}, r"hard=1\.0: give the share"),
        ({"steps": 0}, "steps=0"),
        ({"temperature": 0}, "temperature=0"),
        ({"layers": ((0, 1),)}, "give on= one of hidden, attention"),
    ):
        with pytest.raises(InputError, match=message):
            Distill(**options)  # type: ignore[arg-type]


def check_hidden_states(name: str) -> None:
    """The program's hidden states equal those that the model returns, except for a norm after the last layer."""
    model, program = captured(name)
    batch = BY_NAME[name].example(3, 9)
    model.eval()
    (states,) = hidden_states(program)
    seen: dict[str, torch.Tensor] = {}
    from bmgraph.analysis.interpreter import Observed

    Observed(program).run(batch, {node.name for node in states if node is not None}, seen.__setitem__)
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True)["hidden_states"]
    assert len(states) == len(expected) - 1
    for node, wanted in zip(states[:-1], expected[1:-1]):
        assert node is not None
        assert torch.allclose(seen[node.name], wanted, atol=1e-5)
    assert states[-1] is not None
    assert seen[states[-1].name].shape == expected[-1].shape


# phi: attention and feed-forward are parallel; opt: feed-forwards see flattened tokens
QUICK = ("bert", "phi", "opt")
OTHERS = (
    "roberta",
    "electra",
    "mpnet",
    "gpt2",
    "gpt_neox",
    "gptj",
    "falcon",
    "llama",
    "mistral",
    "gemma2",
    "qwen3",
)


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_hidden_states_are_the_models_own(name: str) -> None:
    check_hidden_states(name)


class Spans(nn.Module):
    """A number and one for each position, beside hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 1)

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        starts = self.head(self.embed(ids))[..., 0]
        return {"energy": (starts * attention_mask).sum(), "starts": starts}


@pytest.mark.slow
def test_outputs_without_features_are_compared_element_by_element() -> None:
    teacher, student = (Spans() for _ in range(2))
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[0, 2:] = 0
    batch = {"ids": torch.randint(0, 11, (3, 5)), "attention_mask": mask}
    program = bg.capture(student, batch)
    resources = {
        "teacher": bg.capture(teacher, batch),
        "text": [batch],
        "trainer": Torch(optimizer=SGD(lr=0.0)),
    }
    done = bg.Pipeline([Distill(on="outputs", steps=1)]).run(program, resources=resources)
    (mine, theirs) = (model(**batch) for model in (student, teacher))
    squares = (mine["energy"] - theirs["energy"]).square() + (
        (mine["starts"] - theirs["starts"]).square() * mask
    ).sum()
    expected = float(squares.detach() / (1 + mask.sum()))
    assert f"loss {expected:.4g} ->" in done.history[-1].edits[0].what
