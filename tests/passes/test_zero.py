"""ZeRO on gloo ranks: losses equal one plain process, and no rank holds more than its shard plus two buckets."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import bmgraph as bg
from bmgraph.backends import AdamW, Torch
from bmgraph.distributed.process_group import Ranks
from bmgraph.errors import BmgraphError, InputError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.pass_manager import PassManager
from bmgraph.passes import LoadDelta, LoRA, Quantize, ZeRO
from bmgraph.passes.zero.parameter_groups import units
from bmgraph.runtime.training.trainer import Trainer
from bmgraph.training.joint_graph import trace_step
from bmgraph.training.placement import Place
from bmgraph.verify.metrics import relative_error
from tests.helpers.live import LiveParameters
from tests.helpers.ranks import run_ranks
from tests.helpers.training import batches, captured_to_train, eager_deltas, toy

FEW, STEPS = 8, 20
"""Training steps of a quick test and of a slow one."""

RATE = 1e-2


def adapted(name: str) -> Program:
    """A toy with int8 weights and a LoRA."""
    program = captured_to_train(name)
    return bg.Pipeline([Quantize("int8", activations="none"), LoRA(r=4, targets=("*",))]).run(program)


def trainer_of(program: Program) -> Trainer:
    trainer: Trainer = bg.compile(
        program, passes=[ZeRO(3)], backend=Torch(optimizer=AdamW(lr=RATE), clip_norm=1.0)
    )
    return trainer


def naive(program: Program, name: str, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of a plain eager loop over the global batches, and the deltas after it."""
    model, deltas = eager_deltas(toy(name), program)
    rule = torch.optim.AdamW(deltas.values(), lr=RATE)
    found = []
    for batch in batches(name, steps):
        rule.zero_grad()
        loss = model(**batch)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(deltas.values(), 1.0)
        rule.step()
        found.append(loss.item())
    return found, {key: item.detach() for key, item in deltas.items()}


def _train(rank: int, saved: str, name: str, steps: int) -> dict[str, Any]:
    """Train on one rank, with a checkpoint half way and the delta saved at the end; returns what the tests check."""
    trainer = trainer_of(bg.load(saved))
    state, given, half = trainer.state, batches(name, steps), steps // 2
    losses = [trainer.step(batch).loss for batch in given[:half]]
    trainer.save(f"{saved}-half")
    packed = {key: place for key, place in state.places.items() if place.packed}
    shards = [state.tensors[key] for key in packed]
    with LiveParameters(shards) as live:
        losses.append(trainer.step(given[half]).loss)
    losses += [trainer.step(batch).loss for batch in given[half + 1 :]]
    trainer.save_delta(f"{saved}-delta")
    reduced = [node for node in state.graph.nodes if "reduce_scatter" in str(node.target)]
    return {
        "losses": losses,
        "most": live.most,
        "dequantised": live.most_dequantised,
        "gathered": live.gathered,
        "shards": {key: (str(item.dtype), state.tensors[key].nbytes) for key, item in packed.items()},
        "reduced": sum(node.meta["val"].numel() for node in reduced),
        "parameters": trainer.program().parameters,
    }


def _resume(rank: int, saved: str, name: str, steps: int) -> list[float]:
    """Load the checkpoint that two ranks saved half way, save it again unchanged, and continue training."""
    trainer = trainer_of(bg.load(saved))
    trainer.load(f"{saved}-half")
    trainer.save(f"{saved}-again-{trainer.state.ranks.size}")
    return [trainer.step(batch).loss for batch in batches(name, steps)[steps // 2 :]]


@dataclass
class Run:
    """One program trained on several ranks, and the plain eager reference."""

    name: str
    program: Program
    saved: str
    ranks: list[dict[str, Any]]
    losses: list[float]
    parameters: dict[str, torch.Tensor]

    @property
    def trained(self) -> Program:
        """The program with the final parameters of the ranks."""
        made = self.program.clone()
        made.parameters.update(self.ranks[0]["parameters"])
        return made


def run(name: str, size: int, folder: Path, steps: int) -> Run:
    program = adapted(name)
    saved = str(folder / "program")
    program.save(saved)
    ranks = run_ranks(size, _train, saved, name, steps) if size > 1 else [_train(0, saved, name, steps)]
    return Run(name, program, saved, ranks, *naive(program, name, steps))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The toy that most tests here use, trained on two ranks."""
    return run("llama", 2, tmp_path_factory.mktemp("pair"), FEW)


def check_losses(done: Run) -> None:
    for rank in done.ranks:
        assert rank["losses"] == pytest.approx(done.losses, abs=1e-5)
        for name, expected in done.parameters.items():
            assert torch.allclose(rank["parameters"][name], expected, atol=1e-4), name
    assert done.losses[0] - min(done.losses) > 1e-3


def check_memory(done: Run) -> None:
    """The expected bytes are counted here, from the program before the pass."""
    parameters = done.program.parameters
    total = sum(tensor.nbytes for tensor in parameters.values())
    by_unit: dict[str, int] = {}
    for name, unit in units(done.program).items():
        by_unit[unit] = by_unit.get(unit, 0) + parameters[name].nbytes
    dequantised = 4 * max(tensor.numel() for tensor in parameters.values() if tensor.dtype == torch.int8)
    for rank in done.ranks:
        padding = 8 * len(rank["shards"])
        assert sum(size for _, size in rank["shards"].values()) <= total / len(done.ranks) + padding
        buckets = 2 * (max(by_unit.values()) + padding)
        assert rank["most"] <= total / len(done.ranks) + padding + buckets + dequantised
        assert rank["dequantised"] == 1
        assert max(rank["gathered"], default=0) <= max(by_unit.values()) + padding


def test_losses_equal_one_plain_process(pair: Run) -> None:
    check_losses(pair)


def test_no_rank_holds_more_than_its_share_and_two_buckets(pair: Run) -> None:
    check_memory(pair)


def test_codes_are_shared_and_the_backbone_is_never_reduced(pair: Run) -> None:
    codes = sum(tensor.nbytes for tensor in pair.program.parameters.values() if tensor.dtype == torch.int8)
    trained = sum(
        tensor.numel() for name, tensor in pair.program.parameters.items() if name not in pair.program.frozen
    )
    assert codes > 0
    for rank in pair.ranks:
        shards = [size for dtype, size in rank["shards"].values() if dtype == "torch.int8"]
        assert codes / 2 <= sum(shards) <= codes / 2 + len(shards)
        assert trained / 2 <= rank["reduced"] <= trained / 2 + len(rank["shards"])


def stored_elements(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by key, flat, of the pieces that its ranks wrote."""
    manifest = json.loads((folder / "manifest.json").read_text())
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for file, spans in manifest.get("spans", {"state.safetensors": {}}).items():
        for key, tensor in load_file(folder / file).items():
            pieces.setdefault(key, []).append((spans.get(key, [0])[0], tensor.flatten()))
    return {
        key: torch.cat([piece for _, piece in sorted(found, key=lambda item: item[0])])
        for key, found in pieces.items()
    }


def check_resumed(done: Run, size: int) -> None:
    saved, again = (Path(f"{done.saved}-{what}") for what in ("half", f"again-{size}"))
    first, second = (stored_elements(folder) for folder in (saved, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(elements, second[name]) for name, elements in first.items())
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (saved, again)]
    of_ranks = {"checksum", "ranks", "spans", "files"}
    assert (
        len(
            {
                json.dumps({key: value for key, value in one.items() if key not in of_ranks})
                for one in manifests
            }
        )
        == 1
    )


def test_saved_on_two_ranks_and_resumed_on_one(pair: Run) -> None:
    found = _resume(0, pair.saved, pair.name, FEW)
    check_resumed(pair, 1)
    assert found == pytest.approx(pair.losses[FEW // 2 :], abs=1e-5)


@pytest.mark.slow
def test_saved_on_two_ranks_and_resumed_on_three(pair: Run) -> None:
    for found in run_ranks(3, _resume, pair.saved, pair.name, FEW):
        assert found == pytest.approx(pair.losses[FEW // 2 :], abs=1e-5)
    check_resumed(pair, 3)


def check_served(done: Run) -> None:
    """The delta that the ranks saved, unmerged on the ONNX engine over a newly quantized backbone, compared with the
    trained program: with float activations and with quantized ones."""
    batch = batches(done.name, 1)[0]
    expected = done.trained(**batch)["logits"]
    assert relative_error(done.program(**batch)["logits"], expected) > 0.5
    for activations, bound in (("none", 1e-3), ("dynamic", 0.06)):
        engine = bg.compile(
            captured_to_train(done.name),
            passes=[Quantize("int8", activations=activations), LoadDelta("delta")],
            backend="onnx",
            resources={"delta": f"{done.saved}-delta"},
        )
        found = engine(**{spec.name: batch[spec.name] for spec in engine.inputs})["logits"]
        assert relative_error(found, expected) < bound, activations


def test_the_delta_that_ranks_trained_is_served(pair: Run) -> None:
    check_served(pair)


@pytest.mark.slow  # the `pair` fixture and the resume on one rank are quick cases
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_architectures_and_numbers_of_ranks(name: str, size: int, tmp_path: Path) -> None:
    done = run(name, size, tmp_path, STEPS)
    check_losses(done)
    check_memory(done)
    check_served(done)


class Small(nn.Module):
    """One layer: the shortest possible step graph."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """x f[B, 3] -> loss f[]."""
        return {"loss": (x @ self.weight.T).mean()}


def _small() -> Program:
    return bg.capture(Small(), {"x": torch.ones(4, 3)})


def served() -> Program:
    torch.manual_seed(0)
    return bg.capture(nn.Linear(4, 2), {"input": torch.randn(3, 4)})


def _message(function: Any, *arguments: Any) -> str:
    try:
        function(*arguments)
    except InputError as error:
        return str(error)
    except BmgraphError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _refusals(rank: int, folder: str) -> dict[str, str]:
    """The errors on one of two ranks that disagree; both ranks raise, so that neither waits for the other."""
    good = _small()
    trainer = trainer_of(good)
    other_weights, other_program = good.clone(), good.clone()
    if rank == 1:
        other_weights.parameters["weight"] = torch.full((2, 3), 1.5)
        with other_program.edit() as editor:
            (linear,) = [node for node in editor.graph.nodes if "linear" in str(node.target)]
            twice = editor.call(torch.ops.aten.mul.Tensor, linear, 2.0, like=linear, after=linear)
            editor.replace(linear, twice)
    Path(folder, f"taken-{rank}").touch()
    (engine_rows,) = bg.compile(served(), backend="onnx")(input=torch.ones(2, 4).numpy()).values()
    return {
        "golden": str(trainer.state).replace(f"'{trainer.state.ranks.group}'", "'0'"),
        "weights": _message(trainer_of, other_weights),
        "program": _message(trainer_of, other_program),
        "rows": _message(trainer.step, {"x": torch.ones(1, 3)}),
        "unshared": _message(lambda: bg.compile(good, backend=Torch(optimizer=AdamW()))),
        "unwritable": _message(trainer.save, Path(folder, "taken-0")),
        "missing": _message(trainer.load, Path(folder, "nothing")),
        "engine": str([round(float(row), 3) for row in engine_rows[:, 0]]),
        "no engine": _message(bg.compile, good.to("meta")),
        "uneven": str(trainer.step({"x": torch.ones(5, 3)}).loss),
    }


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return run_ranks(2, _refusals, str(tmp_path_factory.mktemp("refusals")))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "weights",
            "pass zero: rank 1 has a different tensor 'weight' than rank 0: give all ranks the same program",
        ),
        ("program", "pass zero: rank 1 has a different program than rank 0"),
        ("rows", "a batch of 1 rows cannot be shared by 2 ranks: give at least 2 rows"),
        ("unshared", "2 ranks need a pass that shards the step over them: passes=[..., ZeRO(3)]"),
        ("unwritable", "a file of that name exists"),
        ("missing", "there is no such folder"),
        ("uneven", "3.0"),
        ("no engine", "a program on the meta device has no weights to build an engine from"),
    ],
)
def test_both_ranks_raise(refusals: list[dict[str, str]], what: str, message: str) -> None:
    for told in refusals:
        assert message in told[what]


def test_one_rank_lowers_and_the_other_loads(refusals: list[dict[str, str]]) -> None:
    (expected,) = served()(input=torch.ones(2, 4)).values()
    rows = str([round(float(row), 3) for row in expected[:, 0]])
    assert [told["engine"] for told in refusals] == [rows, rows]


def test_golden(refusals: list[dict[str, str]]) -> None:
    assert [told["golden"] for told in refusals] == [GOLDEN, GOLDEN]


GOLDEN = """\
step:
  input %x : f32[batch, 3]
  trained weight/f32/trained : f32[3]
  %sym_size = aten.sym_size.int(%x, 0) : batch
  %all_gather_into_tensor = _c10d_functional.all_gather_into_tensor(weight/f32/trained, 2, '0') : f32[6]
  %wait_tensor = _c10d_functional.wait_tensor(%all_gather_into_tensor) : f32[6]
  %slice = aten.slice.Tensor(%wait_tensor, 0, 0, 6) : f32[6]
  %view = aten.view(%slice, [2, 3]) : f32[2, 3]
  %t = aten.t(%view) : f32[3, 2]
  %mm = aten.mm(%x, %t) : f32[batch, 2]
  %sum = aten.sum(%mm) : f32[]
  %ones_like = aten.ones_like(%mm, dtype=int64) : i64[batch, 2]
  %sum_1 = aten.sum(%ones_like) : i64[]
  %_to_copy = aten._to_copy(%sum, dtype=float64) : f64[]
  %_to_copy_1 = aten._to_copy(%sum_1, dtype=float64) : f64[]
  %stack = aten.stack([%_to_copy, %_to_copy_1]) : f64[2]
  %all_reduce = _c10d_functional.all_reduce(%stack, 'sum', '0') : f64[2]
  %ones_like_1 = aten.ones_like(%sum, pin_memory=False, memory_format=torch.preserve_format) : f32[]
  %expand = aten.expand(%ones_like_1, [%sym_size, 2]) : f32[batch, 2]
  %t_1 = aten.t(%expand) : f32[2, batch]
  %mm_1 = aten.mm(%t_1, %x) : f32[2, 3]
  %t_2 = aten.t(%mm_1) : f32[3, 2]
  %t_3 = aten.t(%t_2) : f32[2, 3]
  %reshape = aten.reshape(%t_3, [-1]) : f32[6]
  %cat = aten.cat([%reshape]) : f32[6]
  %wait_tensor_1 = _c10d_functional.wait_tensor(%all_reduce) : f64[2]
  %select = aten.select.int(%wait_tensor_1, 0, 0) : f64[]
  %select_1 = aten.select.int(%wait_tensor_1, 0, 1) : f64[]
  %reduce_scatter_tensor = _c10d_functional.reduce_scatter_tensor(%cat, 'sum', 2, '0') : f32[3]
  %wait_tensor_2 = _c10d_functional.wait_tensor(%reduce_scatter_tensor) : f32[3]
  return loss=%select, count=%select_1, d weight/f32/trained=%wait_tensor_2
  update weight/f32/trained: value 1/2 f32[3], gradient 1/2 f32[3], state 1/2 f32[3]
"""


def test_one_rank_needs_no_group() -> None:
    step = PassManager().run([ZeRO(3)], trace_step(_small(), "loss"))
    (record,) = step.history
    assert not [node for node in step.graph.nodes if "c10d" in str(node.target)]
    assert [edit.what for edit in record.edits] == ["1 trained, 24 bytes on each rank"]
    assert record.text == "zero"


def test_the_whole_parameters_go_when_the_caller_lets_them_go() -> None:
    program = _small()
    whole = weakref.ref(program.parameters["weight"])
    trainer = trainer_of(program)
    assert [tensor.numel() for tensor in trainer.state.tensors.values()] == [6]
    del program
    gc.collect()
    assert whole() is None


def test_a_rank_that_has_not_joined_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        InputError, match=r"2 ranks were started .* call torch.distributed.init_process_group"
    ):
        Ranks.here()


@pytest.mark.parametrize("stage", [-1, 4])
def test_other_stages_are_refused(stage: int) -> None:
    with pytest.raises(InputError, match=rf"ZeRO\({stage}\): the stages are 0, 1, 2, 3"):
        ZeRO(stage=stage)


@given(
    sizes=st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=4),
    ranks=st.integers(1, 5),
)
def test_shards_joined_are_what_was_cut(sizes: list[tuple[int, ...]], ranks: int) -> None:
    tensors = {f"t{index}": torch.randn(size) for index, size in enumerate(sizes)}
    split, whole = (Place.pack(tensors.items(), ranks, kept) for kept in (True, False))
    shards = [split.take(rank, tensors.__getitem__) for rank in range(ranks)]
    assert {shard.shape for shard in shards} == {split.shape}
    flat = whole.take(0, tensors.__getitem__)
    assert flat.shape == whole.shape
    assert torch.equal(flat, torch.cat(shards))
    assert all(torch.equal(whole.chunk(flat, rank), shard) for rank, shard in enumerate(shards))
    joined = whole.join(flat, Ranks())
    assert all(torch.equal(joined[name], tensor) for name, tensor in tensors.items())
