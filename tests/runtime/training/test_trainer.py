"""The trainer on one process: equals plain PyTorch, frees what it does not need, and refuses bad input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import SGD, AdamW, Constant, Cosine, Linear, Noam, Onnx, Torch
from bmgraph.errors import BmgraphError, InputError, OrderError
from bmgraph.ir.program import Program
from bmgraph.passes import Quantize
from bmgraph.training.joint_graph import trace_step
from tests.helpers.models import TinyEncoder, tiny_encoder, tokens
from tests.helpers.training import LANGUAGE, batches, naive_losses, toy


class Regression(nn.Module):
    """Two layers and a mean squared error; tests freeze the second bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 20)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        """x f[B, 16], y f[B, 20] -> loss f[]."""
        return {"loss": nn.functional.mse_loss(self.down(torch.relu(self.up(x))), y)}


def regression(rows: int = 5) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(rows, 16), "y": torch.randn(rows, 20)}


def squares(
    outputs: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The squared logits of tokens that are not padding."""
    kept = inputs["attention_mask"].to(torch.float32)
    return (outputs["logits"].square().sum(-1) * kept).sum(), kept.sum()


GOLDEN = """\
step:
  input %x : f32[batch, 3]
  trained weight : f32[2, 3]
  %sym_size = aten.sym_size.int(%x, 0) : batch
  %t = aten.t(weight) : f32[3, 2]
  %mm = aten.mm(%x, %t) : f32[batch, 2]
  %sum = aten.sum(%mm) : f32[]
  %ones_like = aten.ones_like(%mm, dtype=int64) : i64[batch, 2]
  %sum_1 = aten.sum(%ones_like) : i64[]
  %ones_like_1 = aten.ones_like(%sum, pin_memory=False, memory_format=torch.preserve_format) : f32[]
  %expand = aten.expand(%ones_like_1, [%sym_size, 2]) : f32[batch, 2]
  %t_1 = aten.t(%expand) : f32[2, batch]
  %mm_1 = aten.mm(%t_1, %x) : f32[2, 3]
  %t_2 = aten.t(%mm_1) : f32[3, 2]
  %t_3 = aten.t(%t_2) : f32[2, 3]
  return loss=%sum, count=%sum_1, d weight=%t_3
  update weight: value f32[2, 3], gradient f32[2, 3], state f32[2, 3]
"""


def test_golden() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 3))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (x @ self.weight.T).mean()}

    step = trace_step(bg.capture(Scale(), {"x": torch.randn(4, 3)}), "loss")
    assert str(step) == GOLDEN


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in (*LANGUAGE[1:], "bert"))]
)
def test_losses_equal_eager(name: str) -> None:
    given, model = batches(name, 20), toy(name)
    trainer = bg.compile(
        model, example=given[0], backend=Torch(optimizer=AdamW(lr=1e-3, no_decay=False))
    )  # torch decays all
    found = [trainer.step(batch).loss for batch in given]
    expected = naive_losses(model.train(), torch.optim.AdamW(model.parameters(), lr=1e-3), given)
    assert found == pytest.approx(expected, abs=1e-5)
    program = trainer.program()
    assert max(abs(found[i] - found[0]) for i in range(1, 20)) > 1e-2
    model.eval()
    with torch.no_grad():
        logits = model(**given[0])["logits"]
    assert torch.allclose(program(**given[0])["logits"], logits, atol=1e-3)


def test_rules_schedules_and_clipping_are_torch_own() -> None:
    given, model = [regression() for _ in range(12)], Regression()
    trainer = bg.compile(
        model,
        example=given[0],
        backend=Torch(
            optimizer=SGD(lr=0.5, momentum=0.9), schedule=Cosine(warmup=3, steps=10), clip_norm=0.1
        ),
    )
    done = [trainer.step(batch) for batch in given]
    rule = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for batch, result in zip(given, done):
        rule.zero_grad()
        loss = model(**batch)["loss"]
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        rule.param_groups[0]["lr"] = result.rate
        rule.step()
        assert result.loss == pytest.approx(loss.item(), abs=1e-6)
        assert result.norm == pytest.approx(norm.item(), rel=1e-5)
    rates = [result.rate for result in done]
    assert rates[:3] == pytest.approx([0.5 / 3, 1.0 / 3, 0.5])
    assert rates[-3:] == pytest.approx([0, 0, 0], abs=1e-9)


def test_schedules_by_their_papers() -> None:
    assert [Constant(2).share(step) for step in (1, 2, 9)] == [0.5, 1, 1]
    assert [Noam(4).share(step) for step in (1, 4, 16)] == [0.25, 1, 0.5]
    assert [Linear(warmup=2, steps=6).share(step) for step in (1, 2, 4, 7)] == [0.5, 1, 0.5, 0]


def test_a_custom_loss() -> None:
    model = tiny_encoder()
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    given = [tokens(4, 6, seed) for seed in range(5)]
    trainer = bg.compile(
        model, example=given[0], backend=Torch(optimizer=AdamW(lr=1e-2, no_decay=False), loss=squares)
    )
    found = [trainer.step(batch).loss for batch in given]

    def mean(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        total, count = squares(model(**batch), batch)
        return total / count

    expected = naive_losses(model.train(), torch.optim.AdamW(model.parameters(), lr=1e-2), given, mean)
    assert found == pytest.approx(expected, rel=1e-5)


def test_frozen_parameters_and_the_given_program_stay() -> None:
    program = bg.capture(Regression(), regression())
    program.frozen = frozenset({"down.bias", "up.weight"})
    before = {name: tensor.clone() for name, tensor in program.parameters.items()}
    trainer = bg.compile(program, backend=Torch(optimizer=SGD(lr=0.1)))
    for _ in range(3):
        trainer.step(regression())
    after = trainer.program().parameters
    assert all(torch.equal(program.parameters[name], before[name]) for name in before)
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert moved == {"down.weight", "up.bias"}


def test_gradients_pass_through_int8_weights() -> None:
    program = bg.Pipeline([Quantize("int8", activations="none")]).run(bg.capture(Regression(), regression()))
    assert {"up.weight_codes", "down.weight_scale"} <= program.frozen
    module = {
        name: tensor.clone().requires_grad_() for name, tensor in program.parameters.items() if "bias" in name
    }
    weights = {
        side: program.parameters[f"{side}.weight_codes"].float()
        * program.parameters[f"{side}.weight_scale"][:, None]
        for side in ("up", "down")
    }
    trainer = bg.compile(program, backend=Torch(optimizer=SGD(lr=0.1)))
    rule = torch.optim.SGD(module.values(), lr=0.1)
    for batch in [regression() for _ in range(4)]:
        rule.zero_grad()
        hidden = torch.relu(nn.functional.linear(batch["x"], weights["up"], module["up.bias"]))
        loss = nn.functional.mse_loss(
            nn.functional.linear(hidden, weights["down"], module["down.bias"]), batch["y"]
        )
        loss.backward()
        rule.step()
        assert trainer.step(batch).loss == pytest.approx(loss.item(), abs=1e-6)


def test_tensors_derived_from_weights_are_not_kept_for_backward() -> None:
    program = bg.Pipeline([Quantize("int8", activations="none")]).run(bg.capture(Regression(), regression()))
    step = trace_step(program, "loss")
    made = [node for node in step.graph.nodes if node.target is torch.ops.bmgraph.dequantize.default]
    assert len(made) == 3  # both in forward; the second again in backward, for its input's gradient
    order = {node: place for place, node in enumerate(step.graph.nodes)}
    for node in made:
        (reader,) = node.users
        while reader.target is torch.ops.aten.t.default:
            (reader,) = reader.users
        assert order[reader] - order[node] <= 3


def test_dropout_repeats_with_the_seed_and_leaves_the_callers_numbers_alone(model: TinyEncoder) -> None:
    def losses(seed: int) -> list[float]:
        backend = Torch(optimizer=AdamW(lr=1e-3), loss=squares, seed=seed)
        trainer = bg.compile(tiny_encoder(), example=tokens(), backend=backend)
        torch.manual_seed(5)
        found = [trainer.step(tokens()).loss for _ in range(2)]
        after = torch.rand(1)
        torch.manual_seed(5)
        assert torch.equal(after, torch.rand(1))
        return found

    assert losses(0) == losses(0) != losses(1)


def test_batch_norm_statistics_move_as_in_eager() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Linear(4, 20)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": nn.functional.mse_loss(self.last(self.norm(self.first(x))), y)}

    model, given = Normed(), [regression(6) for _ in range(4)]
    program = bg.capture(model, given[0])
    trainer = bg.compile(program, backend=Torch(optimizer=SGD(lr=0.1)))
    found = [trainer.step(batch).loss for batch in given]
    assert torch.equal(program.buffers["norm.running_mean"], torch.zeros(4))
    expected = naive_losses(model.train(), torch.optim.SGD(model.parameters(), lr=0.1), given)
    assert found == pytest.approx(expected, abs=1e-5)
    buffers = trainer.program().buffers
    for name, buffer in model.named_buffers():
        assert torch.allclose(buffers[name], buffer, atol=1e-6), name


def test_a_kernel_may_lay_out_its_result_otherwise_than_torch_says() -> None:
    """The softplus gradient has the input's strides according to torch's meta kernel, but really the output gradient's."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 24), nn.Linear(7, 3)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            """x f[B, 7, 16] -> loss f[]."""
            turned = nn.functional.softplus(self.up(x).transpose(1, 2))
            return {"loss": self.down(turned).square().mean()}

    torch.manual_seed(0)
    model, given = Turned(), [{"x": torch.randn(rows, 7, 16)} for rows in (3, 4)]
    trainer = bg.compile(model, example=given[0], backend=Torch(optimizer=SGD(lr=0.1)))
    found = [trainer.step(batch).loss for batch in given]
    expected = naive_losses(model, torch.optim.SGD(model.parameters(), lr=0.1), given)
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_trained_program_trains_further() -> None:
    trainer = bg.compile(Regression(), example=regression(), backend=Torch(optimizer=SGD(lr=0.1)))
    trainer.step(regression())
    again = bg.compile(trainer.program(), backend=Torch(optimizer=SGD(lr=0.1)))
    batch = regression()
    assert again.step(batch).loss == trainer.step(batch).loss
    program = trainer.program()
    kept = {name: tensor.clone() for name, tensor in program.parameters.items()}
    trainer.step(batch)
    assert all(torch.equal(program.parameters[name], kept[name]) for name in kept)


def test_parameters_that_share_a_gradient() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(3, 4))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": nn.functional.linear(x, self.first + self.second).mean()}

    x = torch.randn(5, 4)
    trainer = bg.compile(Sum(), example={"x": x}, backend=Torch(optimizer=SGD(lr=1.0)))
    trainer.step({"x": x})
    wanted = -x.mean(0).expand(3, 4) / 3
    for tensor in trainer.program().parameters.values():
        assert torch.allclose(tensor, wanted, atol=1e-6)


def test_one_row_and_unequal_rows() -> None:
    trainer = bg.compile(Regression(), example=regression(), backend=Torch(optimizer=SGD(lr=0.1)))
    assert trainer.step(regression(1)).count == 20
    assert trainer.step(regression(7)).count == 140


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "nothing"}, "loss='nothing': the program has no such output"),
        ({"loss": "hidden"}, "a loss is a scalar"),
    ],
)
def test_a_loss_that_is_not_one_is_refused(program: Program, change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bg.compile(program, backend=Torch(optimizer=AdamW(), **change))  # type: ignore[arg-type]


def test_bad_input_is_refused(program: Program) -> None:
    with pytest.raises(InputError, match="precision='bf32'"):
        Torch(precision="bf32")
    with pytest.raises(InputError, match="clip_norm=0"):
        Torch(clip_norm=0)
    with pytest.raises(InputError, match="lr=-1"):
        AdamW(lr=-1)
    with pytest.raises(InputError, match="steps=5: give more than the 9 of warmup"):
        Linear(warmup=9, steps=5)
    with pytest.raises(InputError, match=r"passes=quantize: give passes of the step stage"):
        Torch(passes=(Quantize("int8"),))
    frozen = program.clone()
    frozen.frozen = frozenset(frozen.parameters)
    with pytest.raises(InputError, match="no parameter that trains"):
        bg.compile(frozen, backend=Torch(optimizer=AdamW(), loss=squares))
    with pytest.raises(InputError, match="no weights to train"):
        bg.compile(program.to("meta"), backend=Torch(optimizer=AdamW(), loss=squares))


def test_a_batch_without_labels_changes_nothing() -> None:
    from tests.frontend.test_capture import Classifier

    ids, labels = torch.randint(0, 20, (3, 7)), torch.randint(0, 5, (3, 7))
    trainer = bg.compile(
        Classifier(), example={"ids": ids, "labels": labels}, backend=Torch(optimizer=AdamW())
    )
    before = trainer.program().parameters
    with pytest.raises(InputError, match="every label is ignored"):
        trainer.step({"ids": ids, "labels": torch.full_like(labels, -100)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.program().parameters.items())
    with pytest.raises(InputError, match="missing input 'labels'"):
        trainer.step({"ids": ids})
    with pytest.raises(BmgraphError, match="has dtype float32"):
        trainer.step({"ids": ids, "labels": labels.float()})


def test_a_step_pass_needs_a_backend_that_trains(program: Program) -> None:
    from bmgraph.passes import ZeRO

    with pytest.raises(OrderError, match="of the step stage, which this backend does not have"):
        bg.compile(program, passes=[ZeRO(3)], backend=Onnx())
    with pytest.raises(OrderError, match=r"passes=\[quantize, zero\]"):
        bg.compile(program, passes=[ZeRO(3), Quantize("int8")], backend=Torch(optimizer=AdamW()))
