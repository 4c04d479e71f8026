"""Deltas: each row of a batch chooses a delta and equals the program that has only that delta."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends.onnx.backend import Onnx
from bmgraph.errors import BmgraphError, BundleError, InputError, OrderError, PassError
from bmgraph.ir.program import Program
from bmgraph.passes import Deltas, LoadDelta, LoRA, Merge, MoEfy, Quantize, Shrink
from bmgraph.verify.metrics import relative_error
from tests.helpers.bundles import edit_json, sign
from tests.helpers.captured import captured
from tests.helpers.deltas import replay_in_a_fresh_process, trained
from tests.helpers.models import tokens
from tests.helpers.sweep import sweep
from tests.passes.test_lora import EXACT

Folders = dict[str, str]

ROWS = ["trec", None, "spam", "trec"]


def two_deltas(program: Program, folder: Path, *loras: LoRA) -> Folders:
    """Two saved deltas with different ranks, scales and sites."""
    given = loras or (LoRA(r=3, alpha=5), LoRA(r=2, roles=("attention.q", "feedforward.up")))
    for name, lora in zip(("trec", "spam"), given):
        tuned = trained(bg.Pipeline([lora]).run(program), seed=len(name), size=0.2)
        trained(tuned, seed=ord(name[0]), size=0.2).save_delta(str(folder / name))
    return {name: str(folder / name) for name in ("trec", "spam")}


def together(program: Program, folders: Folders) -> Program:
    return bg.Pipeline([Deltas(("trec", "spam"))]).run(program, resources=folders)


def alone(program: Program, folders: Folders) -> dict[str | None, Program]:
    """The program with each delta alone, and with none."""
    found: dict[str | None, Program] = {None: program}
    for name in folders:
        found[name] = bg.Pipeline([LoadDelta(name)]).run(program, resources=folders)
    return found


def row_by_row(programs: dict[str | None, Program], batch: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    """Each row computed by the program of its delta."""
    outputs = {name: programs[name](**batch)[key] for name in set(ROWS)}
    return torch.stack([outputs[name][row] for row, name in enumerate(ROWS)])


def test_the_rewritten_graph_is_golden(tmp_path: Path) -> None:
    program = bg.capture(nn.Sequential(nn.Linear(16, 24)), {"input": torch.randn(3, 16)})
    folders = two_deltas(program, tmp_path, LoRA(r=3, targets=("*",)), LoRA(r=2, targets=("*",)))
    stamp = "  # site=0.weight part=delta pass=deltas{names=[trec,spam]}"
    assert str(together(program, folders)) == (
        "forward(input: f32[batch, 16], delta: i64[batch] {trec, spam}):\n"
        "  %linear = aten.linear(%input, 0.weight, 0.bias) : f32[batch, 24]\n"
        f"  %index_select = aten.index_select(0.weight_deltas_a, 0, %delta) : f32[batch, 16, 3]{stamp}\n"
        f"  %index_select_1 = aten.index_select(0.weight_deltas_b, 0, %delta) : f32[batch, 3, 24]{stamp}\n"
        f"  %unsqueeze = aten.unsqueeze(%input, 1) : f32[batch, 1, 16]{stamp}\n"
        f"  %matmul = aten.matmul(%unsqueeze, %index_select) : f32[batch, 1, 3]{stamp}\n"
        f"  %matmul_1 = aten.matmul(%matmul, %index_select_1) : f32[batch, 1, 24]{stamp}\n"
        f"  %squeeze = aten.squeeze.dim(%matmul_1, 1) : f32[batch, 24]{stamp}\n"
        f"  %add = aten.add.Tensor(%linear, %squeeze) : f32[batch, 24]{stamp}\n"
        "  return output=%add\n"
    )


def test_removed_neurons_leave_the_deltas_that_rows_choose(tmp_path: Path) -> None:
    """Each row is what its delta alone gives, shrunk by the same neurons; no table keeps what was removed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
    program = bg.capture(model, {"input": torch.randn(4, 16)})
    folders = two_deltas(program, tmp_path, LoRA(r=3, targets=("*",)), LoRA(r=2, targets=("*",)))
    small = bg.Pipeline([Shrink(ffn=0.25)]).run(together(program, folders))
    assert small.tensor("0.weight_deltas_b").shape == (3, 3, 18)
    assert small.tensor("2.weight_deltas_a").shape == (3, 18, 3)
    gone = ~torch.isin(program.tensor("0.bias"), small.tensor("0.bias"))
    batch = {"input": torch.randn(4, 16)}
    for name, one in alone(program, folders).items():
        silent = one.clone()
        for tensor in {"0.weight", "0.bias", "0.weight_lora_b"} & silent.parameters.keys():
            silent.parameters[tensor] = silent.parameters[tensor].detach().clone()
            silent.parameters[tensor][gone] = 0
        found = small(**batch, delta=[name] * 4)["output"]
        assert relative_error(found, silent(**batch)["output"]) < EXACT


@pytest.mark.parametrize("activations", [None, "none"])
def test_rows_equal_the_programs_of_one_delta(
    program: Program, tmp_path: Path, activations: str | None
) -> None:
    folders = two_deltas(program, tmp_path)
    if activations:
        program = bg.Pipeline([Quantize("int8", activations=activations)]).run(program)
    both, batch = together(program, folders), tokens(4, 9, 6)
    found = both(**batch, delta=ROWS)["logits"]
    assert relative_error(found, row_by_row(alone(program, folders), batch, "logits")) < EXACT
    assert torch.equal(both(**batch)["logits"], program(**batch)["logits"])
    assert both.structure().roles == program.structure().roles
    assert both.frozen >= {name for name in both.parameters if "_deltas_" in name}


def test_rows_choose_beside_experts(program: Program, tmp_path: Path) -> None:
    wide = LoRA(r=2, roles=("attention.q", "feedforward.*"))
    folders, batch = (
        two_deltas(program, tmp_path, wide, LoRA(r=3, roles=("feedforward.down",))),
        tokens(4, 9, 6),
    )
    both = together(program, folders)
    parted = bg.Pipeline([MoEfy(8, 8)]).run(both, calibration=[tokens(8, 9, 1)])
    assert len(parted.structure().experts) == 2
    expected = row_by_row(alone(program, folders), batch, "logits")
    assert relative_error(parted(**batch, delta=ROWS)["logits"], expected) < EXACT
    late = bg.Pipeline([MoEfy(8, 8), Deltas(("trec", "spam"))])
    with pytest.raises(OrderError, match=r"try this order: passes=\[deltas.*, moefy"):
        late.run(program, calibration=[tokens(8, 9, 1)], resources=folders)


@pytest.mark.parametrize("name", sweep(("llama", "gpt2", "t5"), ("llama",)))
def test_rows_of_fused_and_separate_projections_on_onnx(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    _, program = captured(name)
    targets = {"llama": "*.q_proj", "gpt2": "*.c_attn", "t5": "*.q"}[name]
    first = LoRA(r=2, targets=(targets,))
    folders = two_deltas(program, tmp_path, first, LoRA(r=3, roles=("attention.o", "feedforward.*")))
    both = together(program, folders)
    batch = {key: value.repeat(2, 1) for key, value in program.example.items()}
    expected = row_by_row(alone(program, folders), batch, "logits")
    assert relative_error(both(**batch, delta=ROWS)["logits"], expected) < EXACT
    engine = bg.compile(both, backend="onnx")
    assert relative_error(engine(**batch, delta=ROWS)["logits"], expected) < 1e-4


def test_the_engine_takes_names_numbers_and_nothing(program: Program, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    folders, batch = two_deltas(program, tmp_path), tokens(4, 9, 6)
    engine = bg.compile(program, [Deltas(("trec", "spam"))], backend="onnx", resources=folders)
    assert torch.equal(engine.example["delta"], torch.tensor([0, 1, 2]))
    engine.save(tmp_path / "engine")
    programs = alone(program, folders)
    for held in (engine, bg.load(tmp_path / "engine")):
        expected = row_by_row(programs, batch, "logits")
        for given in (ROWS, torch.tensor([1, 0, 2, 1])):
            assert relative_error(held(**batch, delta=given)["logits"], expected) < 1e-4
        for given in (None, [None] * 4, torch.zeros(4, dtype=torch.int64)):
            assert relative_error(held(**batch, delta=given)["logits"], program(**batch)["logits"]) < 1e-4
        assert relative_error(held(**batch)["logits"], program(**batch)["logits"]) < 1e-4
        everywhere = held(**batch, delta="spam")["logits"]
        assert relative_error(everywhere, programs["spam"](**batch)["logits"]) < 1e-4
        with pytest.raises(
            InputError, match=r"'delta' names 'spim'; did you mean 'spam'\? \(names: trec, spam"
        ):
            held(**batch, delta=["spim", None, None, None])


def greedy(program: Program, prompt: list[int], steps: int) -> list[int]:
    """Greedy generation after a prompt, without a cache."""
    ids = torch.tensor([prompt])
    for _ in range(steps):
        logits = program(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.slow
def test_rows_of_one_cached_generation_have_their_own_deltas(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    _, program = captured("llama")
    folders = two_deltas(program, tmp_path, LoRA(r=2), LoRA(r=3, roles=("feedforward.*",)))
    prompts = [[5, 9, 11], [7, 3], [5, 9, 11], [4]]
    table = Deltas(("trec", "spam"), capacity=4)
    engine = bg.compile(program, [table], backend=Onnx(generate=True), resources=folders)
    programs = alone(program, folders)
    found = engine.generate(prompts, max_new_tokens=6, delta=ROWS)
    assert found == [greedy(programs[name], prompt, 6) for name, prompt in zip(ROWS, prompts)]
    assert found[0] != found[2]
    assert engine.generate(prompts[:1], max_new_tokens=6) == [greedy(program, prompts[0], 6)]
    with pytest.raises(InputError, match="'delta' names 'spim'; did you mean 'spam'"):
        engine.generate(prompts, delta=["spim"] * 4)
    stream = engine.generate(prompts[:1], max_new_tokens=6, delta="trec", stream=True)
    first = next(stream)
    engine.deltas.add("again", folders["spam"])  # while a generation runs
    engine.deltas.remove("trec")
    engine.deltas.add("trec", folders["spam"])
    rest = [first, *stream]
    assert [piece for _, piece in rest] == greedy(programs["trec"], prompts[0], 6)
    expected = greedy(programs["spam"], prompts[0], 6)
    assert engine.generate(prompts[:2], max_new_tokens=6, delta=["again", None])[0] == expected
    assert engine.generate(prompts[:1], max_new_tokens=6, delta="trec")[0] == expected


def test_wrong_choices_are_refused(program: Program, tmp_path: Path) -> None:
    both, batch = together(program, two_deltas(program, tmp_path)), tokens(4, 9, 6)
    for given, message in (
        (["trec"], r"'delta' has batch 1, but input 'ids' has batch 4"),
        (torch.tensor([0, 1, 2, 3]), r"'delta' holds indices outside 0 to 2"),
        (torch.tensor([0, -1, 2, 1]), r"'delta' holds indices outside 0 to 2"),
        (torch.tensor([0, 1, 2, 1]).int(), r"'delta' has dtype int32"),
        ([1, 0, 2, 1], r"'delta' names 1 "),
    ):
        with pytest.raises(InputError, match=message):
            both(**batch, delta=given)


def test_wrong_deltas_are_refused(program: Program, tmp_path: Path) -> None:
    folders = two_deltas(program, tmp_path)
    with pytest.raises(InputError, match="give the name of each delta once"):
        Deltas(("trec", "trec"))
    with pytest.raises(InputError, match="give the name of each delta once"):
        Deltas()
    with pytest.raises(BmgraphError, match="needs the resource 'spam'"):
        bg.Pipeline([Deltas(("trec", "spam"))]).run(program, resources={"trec": folders["trec"]})
    with pytest.raises(PassError, match="an input 'ids' already"):
        bg.Pipeline([Deltas(("trec",), input="ids")]).run(program, resources=folders)
    with pytest.raises(OrderError, match="cannot run on a program that is delta-per-row"):
        bg.Pipeline([Deltas(("trec",)), Deltas(("spam",))]).run(program, resources=folders)
    with pytest.raises(OrderError, match="merge requires delta"):
        bg.Pipeline([Deltas(("trec",)), Merge()]).run(program, resources=folders)


def test_a_linear_that_mixes_rows_is_refused(tmp_path: Path) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.reshape(-1, 8).cumsum(0)).reshape(x.shape)

    program = bg.capture(Flat(), {"x": torch.randn(3, 5, 8)})
    folders = two_deltas(program, tmp_path, *[LoRA(r=2, targets=("*",))] * 2)
    with pytest.raises(PassError, match=r"inner.weight takes batch\*sequence rows where the batch has batch"):
        together(program, folders)


@pytest.mark.slow
def test_saved_loaded_and_replayed(program: Program, tmp_path: Path) -> None:
    folders, batch = two_deltas(program, tmp_path), tokens(4, 9, 6)
    both = together(program, folders)
    both.save(str(tmp_path / "both"))
    loaded = bg.load(tmp_path / "both")
    assert str(loaded) == str(both)
    assert torch.equal(loaded(**batch, delta=ROWS)["logits"], both(**batch, delta=ROWS)["logits"])
    replay_in_a_fresh_process(
        tmp_path / "both",
        "from tests.helpers.models import tiny_encoder",
        "tiny_encoder()",
        f", resources={folders!r}",
    )

    def rename(graph: dict[str, object]) -> None:
        graph["inputs"][0]["names"] = ["a"]  # type: ignore[index]

    edit_json(tmp_path / "both" / "program.json", rename)
    sign(tmp_path / "both")
    with pytest.raises(BundleError, match="has names for its values, but is not an i64 vector"):
        bg.load(tmp_path / "both")


def test_later_passes_are_verified_with_the_deltas_active(program: Program, tmp_path: Path) -> None:
    """Calibration batches do not choose deltas, so the comparison cycles their rows through all of them."""
    folders = two_deltas(program, tmp_path)
    done = bg.Pipeline([Deltas(("trec", "spam")), Quantize("int8", activations="static")]).run(
        program, resources=folders, calibration=[tokens(4, 8, 1)]
    )
    assert done.history[-1].drift is not None
    assert 0 < done.history[-1].drift < 0.3
    batch = tokens(4, 9, 6)
    assert (
        relative_error(
            done(**batch, delta=ROWS)["logits"], together(program, folders)(**batch, delta=ROWS)["logits"]
        )
        < 0.3
    )
