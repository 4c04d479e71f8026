"""Capture: a program equals its model in eval and training form, and at other sizes."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import CaptureError, InputError
from bmgraph.ir.program import Program
from bmgraph.ir.shape_inference import propagate
from bmgraph.lowering.to_exported_program import deployed
from bmgraph.verify.metrics import relative_error
from tests.helpers.models import TinyEncoder, tokens


def test_eval_form_equals_eager_at_other_sizes(program: Program, model: TinyEncoder) -> None:
    for batch in (tokens(2, 5), tokens(5, 11)):
        with torch.no_grad():
            expected = model(**batch)
        found = program(**batch)
        assert list(found) == ["hidden", "logits"]
        for name in expected:
            assert relative_error(found[name], expected[name]) < 1e-6


def test_training_form_has_eager_gradients(program: Program, model: TinyEncoder) -> None:
    quiet = tokens(3, 7)
    module = program.module(training=True)
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.dropout.default:
            node.update_arg(1, 0.0)
    module.recompile()
    module(*quiet.values())[1].square().sum().backward()
    model.train()
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    try:
        model(**quiet)["logits"].square().sum().backward()
        for name, parameter in model.named_parameters():
            assert relative_error(module.get_parameter(name).grad, parameter.grad) < 1e-5, name
    finally:
        model.zero_grad()
        for layer in model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.1
        model.eval()


def test_names_dims_and_scopes(program: Program) -> None:
    assert [str(spec) for spec in program.inputs] == [
        "ids: i64[batch, sequence]",
        "attention_mask: i64[batch, sequence]",
    ]
    assert program.fixed == ()
    scopes = {node.meta.get("scope") for node in program.graph.nodes}
    assert "blocks.1.up" in scopes


def test_text_of_a_program_is_golden() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(nn.functional.relu(self.first(x))) + x

    text = str(bg.capture(Small(), {"x": torch.randn(3, 4)}))
    assert text == (
        "forward(x: f32[batch, 4]):\n"
        "  %linear = aten.linear(%x, first.weight, first.bias) : f32[batch, 8]\n"
        "  %relu = aten.relu(%linear) : f32[batch, 8]\n"
        "  %linear_1 = aten.linear(%relu, second.weight) : f32[batch, 4]\n"
        "  %add = aten.add.Tensor(%linear_1, %x) : f32[batch, 4]\n"
        "  return output=%add\n"
    )


def test_a_batch_of_one_is_repeated(model: TinyEncoder) -> None:
    program = bg.capture(model, tokens(1, 6))
    assert program(**tokens(4, 9))["logits"].shape == (4, 9, 24)


def test_tied_weights_are_one_parameter() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    program = bg.capture(Tied(), {"ids": torch.randint(0, 10, (3, 4))})
    assert list(program.parameters) == ["embed.weight"]
    assert program.ties == {"head.weight": "embed.weight"}


def test_products_with_a_parameter_become_linears() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = torch.addmm(self.b, x.view(-1, 4), self.a).view(x.shape[0], x.shape[1], 6)
            return flat + x @ self.a

    x = torch.randn(3, 5, 4)
    model = Products()
    program = bg.capture(model, {"x": x})
    assert str(program).count("aten.linear(") == 2
    assert "addmm" not in str(program)
    assert relative_error(program(x=x)["output"], model(x)) < 1e-6


def test_written_out_norm_and_attention_are_folded() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.p = nn.Parameter(torch.rand(8) + 0.5), nn.Linear(8, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
            q, k, v = self.p(x).view(x.shape[0], x.shape[1], 2, 12).transpose(1, 2).chunk(3, -1)
            scores = q @ k.transpose(-1, -2) / 2.0
            return torch.softmax(scores, -1) @ v

    x = torch.randn(2, 5, 8)
    model = Written()
    program = bg.capture(model, {"x": x})
    text = str(program)
    assert "aten.rms_norm(" in text
    assert "aten.scaled_dot_product_attention(" in text
    assert "softmax" not in text
    assert "rsqrt" not in text
    assert relative_error(program(x=x)["output"], model(x)) < 1e-6


def test_in_place_calls_become_pure() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.clone()
            first = y[:, 0]
            first.mul_(2.0)
            y[:, 1] = 5.0
            y.add_(first.sum())
            if self.training:
                self.seen.add_(1)
            return y

    x = torch.randn(3, 4)
    model = InPlace()
    program = bg.capture(model, {"x": x})
    expected = model.eval()(x)
    assert relative_error(program(x=x)["output"], expected) < 1e-6
    assert all(
        "_(" not in line.split("=")[1][:40]
        for line in str(program).splitlines()
        if "aten." in line and "mul" in line
    )
    assert program.writes == ("seen",)
    module = program.module(training=True)
    module(x)
    assert float(program.buffers["seen"]) == 1.0


def test_no_device_is_left_and_a_program_moves(program: Program) -> None:
    assert "device" not in str(program)
    moved = program.to("meta")
    assert moved.device.type == "meta"
    assert program.device.type == "cpu"


def test_clones_share_storage_and_nothing_else(program: Program) -> None:
    copy = program.clone()
    name = next(iter(copy.parameters))
    assert copy.parameters[name].data_ptr() == program.parameters[name].data_ptr()
    copy.parameters[name] = torch.zeros(1)
    assert program.parameters[name].numel() > 1
    assert str(copy) == str(program)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({}, "lacks 'ids', 'attention_mask'"),
        ({"ids": torch.zeros(2, 3, dtype=torch.long)}, "lacks 'attention_mask'"),
        ({**tokens(), "labels": torch.zeros(1)}, "no input 'labels'"),
        ({**tokens(), "ids": [1, 2]}, "is a list"),
    ],
)
def test_a_wrong_example_is_refused(model: TinyEncoder, example: dict[str, object], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        bg.capture(model, example)


def test_nan_weights_are_refused() -> None:
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.raises(CaptureError, match="'weight' holds NaN"):
        bg.capture(model, {"input": torch.randn(2, 4)})


def test_control_flow_on_data_says_where_and_what_to_do() -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(CaptureError, match=r"depends on data at .*test_capture\.py:\d+.*torch\.where"):
        bg.capture(Branch(), {"x": torch.randn(3, 4)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": None}, "missing input 'ids'"),
        ({"ids": torch.zeros(3, 8)}, r"dtype float32: expected int64; convert it"),
        ({"ids": torch.zeros(3, dtype=torch.long)}, r"has shape \[3\]: expected ids: i64\[batch, sequence\]"),
        ({"ids": torch.zeros(3, 9, dtype=torch.long)}, "sequence 8, but input 'ids' has sequence 9"),
        ({"idz": torch.zeros(3, 8)}, "unknown input 'idz'; did you mean 'ids'"),
    ],
)
def test_a_wrong_batch_is_refused(program: Program, change: dict[str, object], message: str) -> None:
    batch = {**tokens(3, 8), **change}
    with pytest.raises(InputError, match=message):
        program(**{name: value for name, value in batch.items() if value is not None})


class Classifier(nn.Module):
    """Flattens logits and labels for the loss, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 5)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """ids, labels i64[B, S] -> loss f[], logits f[B, S, 5]."""
        logits = self.head(self.embed(ids))
        return {"loss": nn.functional.cross_entropy(logits.view(-1, 5), labels.view(-1)), "logits": logits}


class Positions(nn.Module):
    """Adds position embeddings up to the input length."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.table = Classifier(), nn.Embedding(30, 8)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """ids, labels i64[B, S] -> loss f[], logits f[B, S, 5]."""
        places = self.table(torch.arange(labels.shape[1]))
        logits = self.inner.head(self.inner.embed(ids) + places)
        return {"loss": nn.functional.cross_entropy(logits.view(-1, 5), labels.view(-1)), "logits": logits}


def test_an_engine_needs_no_labels_for_their_size() -> None:
    ids, labels = torch.randint(0, 20, (3, 7)), torch.randint(0, 5, (3, 7))
    served = deployed(bg.capture(Positions(), {"ids": ids, "labels": labels}))
    assert [spec.name for spec in served.inputs] == ["ids"]


def test_labels_leave_batch_and_length_free() -> None:
    ids, labels = torch.randint(0, 20, (3, 7)), torch.randint(0, 5, (3, 7))
    program = bg.capture(Classifier(), {"ids": ids, "labels": labels})
    assert program.fixed == ()
    assert [spec.shape for spec in program.inputs] == [("batch", "sequence")] * 2
    assert program(ids=ids[:1, :4], labels=labels[:1, :4])["loss"].isfinite()


def test_repeated_shape_inference_keeps_sizes_dynamic_with_labels() -> None:
    """Labels are padded and shifted; padding must not fix the sizes to those that shapes were inferred with."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(4, 5)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            shifted = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
            return nn.functional.cross_entropy(self.out(x).flatten(0, 1), shifted.flatten())

    x, labels = torch.randn(2, 6, 4), torch.randint(0, 5, (2, 6))
    again = bg.capture(Shifted(), {"x": x, "labels": labels}).clone()
    text = str(again)
    propagate(again, everything=True)
    assert str(again) == text


@pytest.mark.parametrize(
    "norm",
    [
        nn.InstanceNorm1d(8, affine=True),
        nn.InstanceNorm1d(8, track_running_stats=True),
        nn.BatchNorm1d(8, track_running_stats=False),
    ],
)
def test_norms_without_running_statistics_take_those_of_their_input(norm: nn.Module) -> None:
    """In eval mode too; one that has running statistics uses them."""
    program = bg.capture(norm, {"input": torch.randn(3, 8, 5)})
    assert not program.training
    x = torch.randn(4, 8, 7)
    expected = norm.eval()(x)
    assert relative_error(program(input=x)["output"], expected) < 1e-6
    assert relative_error(bg.compile(program, [], backend="onnx")(input=x)["output"], expected) < 1e-5


def test_a_capture_that_fails_prints_no_graph(capsys: pytest.CaptureFixture[str]) -> None:
    class Decides(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            doubled = x * 2
            print("of the model", file=sys.stderr)
            return doubled if bool((x > 0).any()) else x

    with pytest.raises(CaptureError, match="control flow depends on data"):
        bg.capture(Decides(), (torch.randn(2, 4),))
    assert set(capsys.readouterr().err.splitlines()) <= {"of the model", ""}
