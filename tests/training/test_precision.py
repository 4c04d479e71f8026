"""Steps in half precision: as near to plain PyTorch as that is to itself, with float32 masters at every stage of ZeRO."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import SGD, AdamW, Torch
from bmgraph.errors import InputError
from bmgraph.ir.program import Program
from bmgraph.passes import LoRA, Quantize, ZeRO
from bmgraph.runtime.training.trainer import Trainer
from bmgraph.training.half_form import in_half
from bmgraph.training.precision import DTYPES
from tests.helpers.captured import NAMES
from tests.helpers.captured import captured as of_architecture
from tests.helpers.ranks import run_ranks
from tests.helpers.training import batches as of_zoo
from tests.helpers.training import captured_to_train, toy
from tests.helpers.zoo import BY_NAME

Batch = dict[str, torch.Tensor]
BF16 = torch.bfloat16
RULE = AdamW(lr=1e-3, weight_decay=0.0)


class Block(nn.Module):
    """Embeddings, positions of a buffer, attention with an additive mask, a norm after each residual, and classes."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.qkv, self.out = nn.Embedding(50, 32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 50)
        self.norms = nn.ModuleList([nn.LayerNorm(32), nn.LayerNorm(32)])
        self.register_buffer("angles", torch.arange(1.0, 33.0) / 7)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        """ids, mask, y i64[B, S] -> loss f[]."""
        places = torch.arange(ids.shape[1], device=ids.device).float()[:, None] * self.angles.float()
        x = self.table(ids) + places.sin().to(self.table.weight.dtype)
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(1, 2) / 6 + (1 - mask[:, None]).float() * torch.finfo(torch.float32).min
        x = self.norms[0](x + self.out(scores.float().softmax(-1).to(v.dtype) @ v))
        x = self.norms[1](x + self.down(nn.functional.gelu(self.up(x))))
        logits = self.head(x).float().flatten(0, 1)
        return {"loss": nn.functional.cross_entropy(logits, y.flatten())}


def made() -> Block:
    torch.manual_seed(0)
    return Block()


def batches(count: int = 20, rows: int = 6) -> list[Batch]:
    """Ragged labels; the last row of the first batch is masked whole."""
    torch.manual_seed(1)
    found = []
    for index in range(count):
        ids = torch.randint(0, 50, (rows, 9))
        mask = (torch.arange(9) < torch.arange(9, 9 - rows, -1)[:, None]).long()
        mask[-1] *= int(index != 0)
        found.append({"ids": ids, "mask": mask, "y": torch.where(mask.bool(), ids * 7 % 50, -100)})
    return found


@cache
def captured(half: bool = False) -> Program:
    return bg.capture(made().to(BF16) if half else made(), batches(1)[0])


def trainer_of(program: Program, *passes: Any, precision: str = "bf16", **options: Any) -> Trainer:
    backend = Torch(**{"optimizer": RULE, "precision": precision, **options})
    trainer: Trainer = bg.compile(program, passes=passes, backend=backend)
    return trainer


def plain_losses(model: nn.Module, given: list[Batch], rows: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """A loop that computes in half precision with float32 masters, on so many rows of a batch at a time."""
    masters = [parameter.detach().clone() for parameter in model.train().parameters()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to(dtype)
    for name, buffer in model.named_buffers():
        buffer.data = buffers[name]
    rule, losses = torch.optim.AdamW(masters, lr=1e-3, weight_decay=0.0), []
    key = "y" if "y" in given[0] else "labels"
    for batch in given:
        for parameter, master in zip(model.parameters(), masters):
            parameter.data.copy_(master)
            parameter.grad = None
        total = 0.0
        shifted = [labels[:, 1:] if key == "labels" else labels for labels in batch[key].split(rows)]
        counts = [int((labels != -100).sum()) for labels in shifted]
        for index, count in enumerate(counts):
            part = {name: value.split(rows)[index] for name, value in batch.items()}
            if count:
                loss = model(**part)["loss"].float() * (count / sum(counts))
                loss.backward()
                total += loss.item()
        for parameter, master in zip(model.parameters(), masters):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        rule.step()
        losses.append(total)
    return torch.tensor(losses)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).square().mean().sqrt())


def check_as_near(program: Program, build: Any, given: list[Batch]) -> None:
    found = torch.tensor([trainer.step(batch).loss for trainer in [trainer_of(program)] for batch in given])
    plain = plain_losses(build(), given, len(next(iter(given[0].values()))))
    orders = [distance(plain, plain_losses(build(), given, rows)) for rows in (1, 2, 3)]
    assert distance(found, plain) <= 2 * max(orders)
    assert max(orders) < 0.01


def test_bf16_is_as_near_to_a_plain_loop_as_that_is_to_itself() -> None:
    check_as_near(captured(), made, batches())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bf16_on_toy_models(name: str) -> None:
    check_as_near(captured_to_train(name), lambda: toy(name), of_zoo(name, 20))


@pytest.mark.slow
def test_values_are_half_and_masters_and_moments_float32(tmp_path: Path) -> None:
    trainer, given = trainer_of(captured()), batches(4)
    before = {name: value.clone() for name, value in captured().parameters.items()}
    for batch in given[:2]:
        trainer.step(batch)
    state, update = trainer.state, trainer.update
    assert {state.tensors[name].dtype for name in state.trained} == {BF16}
    assert {value.dtype for held in update.moments.values() for value in held.values()} == {torch.float32}
    elements = sum(value.numel() for value in before.values())
    assert trainer.plan.state == 12 * elements  # masters and two moments
    trained = trainer.program()
    for name, value in trained.parameters.items():
        assert torch.equal(value, update.saved(name)[1])  # float32, as the program's
        assert torch.equal(state.tensors[name], value.to(BF16))
        assert torch.equal(captured().parameters[name], before[name])  # the given program stays
    assert torch.equal(trained.buffers["angles"], captured().buffers["angles"])
    trainer.save(tmp_path / "one")
    other = trainer_of(captured(), ZeRO(3))
    other.load(tmp_path / "one")
    losses = [trainer.step(batch).loss for batch in given[:2]]
    assert [other.step(batch).loss for batch in given[:2]] == losses
    wide = trainer_of(captured(), precision="fp32")
    with pytest.warns(UserWarning, match="precision bf16 -> fp32"):
        wide.load(tmp_path / "one")
    assert torch.equal(wide.state.tensors["up.weight"], trained.parameters["up.weight"])
    assert wide.step(given[0]).loss == pytest.approx(losses[0], rel=5e-3)


@pytest.mark.slow
def test_a_bf16_model_trains_in_what_is_asked_for() -> None:
    given = batches(3)
    for precision, stored in (("fp32", torch.float32), ("fp16", torch.float16)):
        trainer = trainer_of(captured(half=True), precision=precision)
        losses = [trainer.step(batch).loss for batch in given]
        assert {trainer.state.tensors[name].dtype for name in trainer.state.trained} == {stored}
        products = [node for node in trainer.state.graph.nodes if node.target is torch.ops.aten.mm.default]
        assert {node.meta["val"].dtype for node in products} == {stored}
        assert {value.dtype for value in trainer.program().parameters.values()} == {BF16}
        wide = made().to(BF16).float()
        rule = torch.optim.AdamW(wide.train().parameters(), lr=1e-3, weight_decay=0.0)
        for batch, loss in zip(given, losses):
            rule.zero_grad()
            value = wide(**batch)["loss"]
            value.backward()
            rule.step()
            assert loss == pytest.approx(value.item(), rel=1e-5 if precision == "fp32" else 1e-2)


@pytest.mark.slow
def test_a_delta_trains_beside_frozen_weights_that_stay_as_they_are_stored() -> None:
    passes = [Quantize("int8", activations="none", smallest=1), LoRA(r=4, targets=("*",))]
    program = bg.Pipeline(passes).run(captured())
    trainer, wide = trainer_of(program, ZeRO(3)), trainer_of(program, precision="fp32")
    for batch in batches(3):
        assert trainer.step(batch).loss == pytest.approx(wide.step(batch).loss, rel=5e-3)
    after = trainer.program()
    assert {program.parameters[name].dtype for name in program.frozen} == {torch.float32, torch.int8}
    assert all(torch.equal(after.parameters[name], program.parameters[name]) for name in program.frozen)
    moved = [name for name in program.parameters if name not in program.frozen]
    assert not any(torch.equal(after.parameters[name], program.parameters[name]) for name in moved)


def test_what_is_kept_in_float32() -> None:
    program = in_half(captured(), BF16, list(captured().parameters))
    dtypes: dict[str, set[torch.dtype]] = {}
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and isinstance(node.meta["val"], torch.Tensor):
            dtypes.setdefault(node.target.overloadpacket.__name__, set()).add(node.meta["val"].dtype)
    kept = ("layer_norm", "cross_entropy_loss", "sin", "clamp")
    assert all(dtypes[name] == {torch.float32} for name in kept)
    half = ("embedding", "linear", "scaled_dot_product_attention", "gelu")
    assert all(dtypes[name] == {BF16} for name in half), dtypes
    (attention,) = [node for node in program.graph.nodes if "attention" in str(node.target)]
    assert {node.meta["val"].dtype for node in attention.all_input_nodes} == {BF16}
    norms = [node for node in program.graph.nodes if node.target is torch.ops.aten.layer_norm.default]
    assert all(
        node.args[0].args[0].meta["val"].dtype == BF16 for node in norms
    )  # hidden states, widened for the norm


def first_squared(outputs: Batch, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The squared first output, as a summed loss and a count."""
    first = next(iter(outputs.values()))
    return first.square().sum(), torch.ones_like(first).sum()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_steps_in_half_precision(name: str) -> None:
    _, program = of_architecture(name)
    if program.training:
        pytest.skip(program.training)
    batch = BY_NAME[name].example(3, BY_NAME[name].lengths[1])
    options: dict[str, Any] = {"optimizer": SGD(lr=1e-3), "loss": first_squared}
    wide = trainer_of(program, precision="fp32", **options).step(batch).loss
    for precision in ("bf16", "fp16"):
        found = trainer_of(program, precision=precision, **options).step(batch)
        assert not found.skipped
        assert found.loss == pytest.approx(wide, rel=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_cuda_as_on_the_host(precision: str) -> None:
    program = bg.capture(made().cuda(), {name: value.cuda() for name, value in batches(1)[0].items()})
    trainer = trainer_of(program, ZeRO(3), precision=precision, accumulate=2, clip_norm=1.0)
    host = trainer_of(captured(), precision="fp32", clip_norm=1.0)
    for batch in batches(6):
        placed = {name: value.cuda() for name, value in batch.items()}
        found, expected = trainer.step(placed), host.step(batch)
        assert (found.loss, found.norm) == (
            pytest.approx(expected.loss, rel=1e-2),
            pytest.approx(expected.norm, rel=5e-2),
        )


def on_ranks(rank: int, stages: tuple[int, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for stage in stages:
        dtype = "bf16" if stage == 2 else "fp32"
        trainer = trainer_of(captured(), ZeRO(stage), clip_norm=0.5, accumulate=2, reduce_dtype=dtype)
        assert {update.gradient.dtype for update in trainer.state.updates.values()} == {DTYPES[dtype]}
        done = [trainer.step(batch) for batch in batches(3)]
        found[f"stage {stage}"] = [(item.loss, item.norm) for item in done]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stages", [(2, 3), (0, 1)])
def test_ranks_and_stages_agree(stages: tuple[int, ...]) -> None:
    first, second = run_ranks(2, on_ranks, stages)
    assert first == second
    single = trainer_of(captured(), clip_norm=0.5)
    plain = [(item.loss, item.norm) for item in map(single.step, batches(3))]
    for key, found in first.items():
        assert found == [pytest.approx(pair, rel=5e-3) for pair in plain], key


def test_options_are_checked() -> None:
    with pytest.raises(InputError, match="precision='fp8': choose one of fp32, bf16, fp16"):
        Torch(optimizer=RULE, precision="fp8")
    for options in ({"reduce_dtype": "bf16"}, {"precision": "fp16", "reduce_dtype": "fp16"}):
        with pytest.raises(InputError, match="choose fp32, or bf16 for a step in half precision"):
            Torch(optimizer=RULE, **options)
