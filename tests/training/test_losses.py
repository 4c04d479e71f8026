"""On one rank every scalar loss is taken as it is; a mean that ranks can share is split so that its parts add up."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import SGD, Torch
from bmgraph.errors import InputError
from bmgraph.ir.evaluation import GraphRunner
from bmgraph.training.joint_graph import _call_loss
from bmgraph.training.loss_terms import split_loss
from bmgraph.training.row_axes import find_rows

pytestmark = pytest.mark.filterwarnings("ignore:Using a target size")

Batch = dict[str, torch.Tensor]
Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
functional = nn.functional
CLASSES = torch.tensor([1.0, 2.0, 0.5, 1.5, 3.0, 1.0])


class Model(nn.Module):
    """A layer, and a function of it and the inputs that gives the loss."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.loss = nn.Linear(6, 6), loss
        self.register_buffer("weights", CLASSES.clone())

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Batch:
        """x f[B, 6], y -> loss f[]."""
        return {"loss": self.loss(self, x, y)}


def class_weights(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(model.layer(x), y, model.weights, ignore_index=0, label_smoothing=0.1)


def soft_labels(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(model.layer(x), torch.softmax(y, -1))


def masked_mean(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    kept = (y > 0).float()
    return (model.layer(x).square().sum(-1) * kept).sum() / kept.sum().clamp(min=1)


def weighted_rows(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (model.layer(x).square().sum(-1) * y).sum() / y.sum()


def summed_over_valid(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(model.layer(x), y, ignore_index=0, reduction="sum") / (y != 0).sum()


def divergence(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    found = torch.log_softmax(model.layer(x), -1)
    return functional.kl_div(found, torch.softmax(y, -1), reduction="batchmean")


def broadcast(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return 2.0 * functional.mse_loss(model.layer(x).unsqueeze(1), y.unsqueeze(2))


def binary(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.binary_cross_entropy(torch.sigmoid(model.layer(x)), torch.sigmoid(y))


def answer(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Two means over different numbers of items, as of a question answerer."""
    start, end = model.layer(x), model.layer(-x)
    first = functional.cross_entropy(start, y, ignore_index=0)
    return (first + functional.cross_entropy(end, 5 - y, ignore_index=0)) / 2


def auxiliary(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A mean and a product of means, as of a router."""
    found = model.layer(x)
    return functional.mse_loss(found, y) + 0.1 * (found.mean(0) * found.sigmoid().mean(0)).sum()


def contrastive(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Both directions over the pairs of a batch."""
    scores, own = model.layer(x) @ y.T, torch.arange(x.shape[0], device=x.device)
    return (functional.cross_entropy(scores, own) + functional.cross_entropy(scores.T, own)) / 2


def norm(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return model.layer(x).square().sum().sqrt()


def fractions(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The weights may sum to less than the bound."""
    return (model.layer(x).square().sum(-1) * y).sum() / y.sum().clamp(min=1)


def halves(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """One row weighs less than the bound."""
    kept = (y > 0).float() * 0.5
    return (model.layer(x).square().sum(-1) * kept).sum() / kept.sum().clamp(min=1)


LABELS, NUMBERS, WEIGHTS = (
    torch.tensor([1, 2, 0, 3, 5]),
    torch.randn(5, 6),
    torch.tensor([1.0, 0.0, 2.0, 0.5, 0.25]),
)
SHARED: list[tuple[Loss, torch.Tensor]] = [
    (class_weights, LABELS), (soft_labels, NUMBERS), (masked_mean, WEIGHTS), (weighted_rows, WEIGHTS),
    (summed_over_valid, LABELS), (divergence, NUMBERS), (broadcast, NUMBERS[:, :4]), (binary, NUMBERS),
]  # fmt: skip
ALONE: list[tuple[Loss, torch.Tensor]] = [
    (answer, LABELS), (auxiliary, NUMBERS), (contrastive, NUMBERS), (norm, NUMBERS), (fractions, WEIGHTS / 10), (halves, WEIGHTS),
]  # fmt: skip


def batch_of(y: torch.Tensor) -> Batch:
    return {"x": torch.randn(5, 6, generator=torch.Generator().manual_seed(1)), "y": y}


@pytest.mark.parametrize(("loss", "y"), SHARED + ALONE)
def test_one_rank_takes_a_step_of_plain_torch(loss: Loss, y: torch.Tensor) -> None:
    model, batch = Model(loss), batch_of(y)
    plain = copy.deepcopy(model)
    expected = plain(**batch)["loss"]
    expected.backward()
    trainer = bg.compile(model, example=batch, backend=Torch(optimizer=SGD(lr=1.0)))
    assert trainer.step(batch).loss == pytest.approx(expected.item(), abs=1e-6)
    moved = model.layer.weight - trainer.program().parameters["layer.weight"]
    assert torch.allclose(moved, plain.layer.weight.grad, atol=1e-6)


@pytest.mark.parametrize(("loss", "y"), SHARED)
def test_sums_and_counts_of_parts_make_the_mean(loss: Loss, y: torch.Tensor) -> None:
    model, batch = Model(loss), batch_of(y)
    split = split_loss(bg.capture(model, batch), "loss")
    assert find_rows(split).axes == {"x": 0, "y": 0}
    parts = [{name: item[rows] for name, item in batch.items()} for rows in (slice(2), slice(2, 5))]
    terms = [GraphRunner(split.graph, split.tensors()).run(*part.values()) for part in parts]
    total, count = (sum(float(part[place]) for part in terms) for place in range(2))
    assert total / count == pytest.approx(model(**batch)["loss"].item(), abs=1e-6)


@pytest.mark.parametrize(("loss", "y"), ALONE)
def test_what_ranks_cannot_share_is_refused(loss: Loss, y: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"is not one mean over items .* Torch\(batch=\"rank\"\)"):
        split_loss(bg.capture(Model(loss), batch_of(y)), "loss")


def test_a_mean_of_a_batch_without_items_is_as_in_torch() -> None:
    batch = batch_of(-WEIGHTS)
    trainer = bg.compile(Model(masked_mean), example=batch, backend=Torch(optimizer=SGD(lr=1.0)))
    assert trainer.step(batch).loss == 0.0


def test_a_function_may_return_one_scalar_on_one_rank() -> None:
    def mean(outputs: Batch, inputs: Batch) -> torch.Tensor:
        return outputs["output"].square().mean()

    torch.manual_seed(0)
    layer, x = nn.Linear(4, 2), torch.randn(3, 4)
    trainer = bg.compile(layer, example=(x,), backend=Torch(optimizer=SGD(lr=1.0), loss=mean))
    assert trainer.step({"input": x}).loss == pytest.approx(layer(x).square().mean().item())
    with pytest.raises(InputError, match=r"loss='mean' returned a tensor \[\]: return \(sum, count\)"):
        _call_loss(mean, True, {"output": x}, {})


def test_a_function_reads_inputs_that_forward_does_not_take() -> None:
    def weighted(outputs: Batch, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return (outputs["output"].square().sum(-1) * inputs["importance"]).sum(), inputs["importance"].sum()

    torch.manual_seed(0)
    layer, x = nn.Linear(4, 2), torch.randn(5, 4)
    example = {"input": x[:3], "importance": torch.ones(3)}
    trainer = bg.compile(layer, example=example, backend=Torch(optimizer=SGD(lr=1.0), loss=weighted))
    weights = torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0])
    expected = (layer(x).square().sum(-1) * weights).sum() / weights.sum()
    assert trainer.step({"input": x, "importance": weights}).loss == pytest.approx(expected.item())
    served = bg.compile(trainer.program(), backend="onnx")
    assert [spec.name for spec in served.inputs] == ["input"]


def test_a_loss_function_may_make_and_read_tensors_of_its_own() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 2), torch.randn(6, 4)
    scales, offset = torch.tensor([1.0, 3.0]), torch.randn(4, 2)

    def loss(outputs: Batch, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        error = outputs["output"] * torch.tensor([2.0, 0.5]) - inputs["input"] @ offset
        return (error * scales).square().sum(), torch.tensor(2.5)

    expected, weight = loss({"output": model(x)}, {"input": x})[0] / 2.5, model.weight
    gradient = torch.autograd.grad(expected, weight)[0]
    after = (weight - 0.1 * gradient).detach()
    trainer = bg.compile(model, example={"input": x}, backend=Torch(optimizer=SGD(lr=0.1), loss=loss))
    result = trainer.step({"input": x})
    assert result.loss == pytest.approx(float(expected), rel=1e-6)
    assert result.count == 2.5
    torch.testing.assert_close(trainer.program().parameters["weight"], after)


def test_a_loss_function_that_reads_a_weight_of_its_own_is_refused() -> None:
    model, x = nn.Linear(4, 2), torch.randn(6, 4)

    def loss(outputs: Batch, inputs: Batch) -> torch.Tensor:
        return outputs["output"].square().sum() + model.weight.square().sum()

    with pytest.raises(InputError, match=r"reads a tensor \[2, 4\] of its own that requires a gradient"):
        bg.compile(model, example={"input": x}, backend=Torch(optimizer=SGD(lr=0.1), loss=loss))
