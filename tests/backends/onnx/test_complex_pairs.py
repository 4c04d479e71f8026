"""Complex values are computed as pairs of real ones in an engine, or refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import Onnx
from bmgraph.backends.onnx.complex_pairs import write_complex_as_pairs
from bmgraph.errors import BackendError
from bmgraph.verify.metrics import relative_error

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

FUNCTIONS: dict[str, Function] = {
    "product": lambda a, b: a * b,
    "quotient": lambda a, b: a / (b + 3),
    "by a number": lambda a, b: a * 2.5 + (1 - b / 2),
    "by a complex number": lambda a, b: a * (2 - 1j) + b * 1j + 3j,
    "by real values": lambda a, b: a * b.real + b.imag - a / (a.real + 9),
    "real by complex": lambda a, b: b.real * a - b.imag[0] + a,
    "matmul": lambda a, b: a @ b.transpose(0, 1),
    "conj": lambda a, b: a.conj() * torch.conj(b.t()).t(),
    "exp": lambda a, b: torch.exp(a * 0.1) + torch.polar(b.abs(), a.real),
    "moved": lambda a, b: torch.cat([a, b.flip(0)], 1).reshape(-1, 2, 4).transpose(1, 2)[..., 1:],
    "stacked": lambda a, b: torch.stack([a, -b], -1).sum(-1).mean(1, keepdim=True),
    "chosen": lambda a, b: torch.where(a.real > 0, a, b)[torch.tensor([1, 0])],
    "alpha": lambda a, b: torch.sub(a, b, alpha=2),
    "made": lambda a, b: torch.complex(a.real, b.imag) * a.real.to(torch.complex64),
}


class Complex(nn.Module):
    """f[B, 4, 2] as c[B, 4], through functions of it and a complex table."""

    def __init__(self, functions: dict[str, Function]) -> None:
        super().__init__()
        self.functions = functions
        self.register_buffer("table", torch.polar(torch.ones(4), torch.arange(4.0)))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        a, b = torch.view_as_complex(x) * self.table, torch.view_as_complex(y)
        return {name: torch.view_as_real(function(a, b)) for name, function in self.functions.items()}


def inputs(rows: int = 3) -> dict[str, torch.Tensor]:
    return {name: torch.randn(rows, 4, 2) for name in ("x", "y")}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parts_compute_what_the_complex_values_do(name: str) -> None:
    model = Complex({"value": FUNCTIONS[name]})
    program = bg.capture(model, inputs(), prove=False)
    write_complex_as_pairs(program)
    assert not any(
        isinstance(value, torch.Tensor) and value.is_complex()
        for value in (*program.tensors().values(), *(node.meta.get("val") for node in program.graph.nodes))
    )
    batch = inputs()
    assert relative_error(program(**batch)["value"], model(**batch)["value"]) < 1e-6


def test_an_engine_computes_them() -> None:
    model = Complex({name: FUNCTIONS[name] for name in ("product", "exp", "moved")})
    engine = bg.compile(model, example=inputs(), backend="onnx")
    batch = inputs(5)
    expected = model(**batch)
    for name, value in engine(**batch).items():
        assert relative_error(value, expected[name]) < 1e-6


class Outputs(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "x", "message"),
    [
        (lambda x: torch.fft.fft(x).real, torch.randn(2, 4), r"operator aten\.fft_fft.* complex values"),
        (
            lambda x: torch.view_as_complex(x).sin().abs(),
            torch.randn(2, 4, 2),
            r"operator aten\.sin.* complex values",
        ),
        (lambda x: torch.view_as_complex(x) * 2, torch.randn(2, 4, 2), "output 'output' is complex"),
        (lambda x: x.abs(), torch.randn(2, 4, dtype=torch.complex64), "input 'x' is complex"),
    ],
    ids=["fft", "sin", "output", "input"],
)
def test_what_has_no_form_is_refused_by_name(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, message: str
) -> None:
    program = bg.capture(Outputs(function), {"x": x}, prove=False)
    with pytest.raises(BackendError, match=message):
        write_complex_as_pairs(program)


class Rotated(nn.Module):
    """A decoder whose queries and keys turn by complex multiplication, as those of Llama 4 do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(11, 16), nn.Linear(16, 11, bias=False)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.register_buffer("rates", 10 ** -torch.linspace(0, 1, 4))

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x, place = self.embed(ids), torch.arange(ids.shape[1])
        angles = place[:, None] * self.rates
        turns = torch.polar(torch.ones_like(angles), angles)[:, None]
        q, k, v = (item(x).unflatten(-1, (2, 8)) for item in (self.q, self.k, self.v))
        q, k = (
            torch.view_as_real(torch.view_as_complex(item.unflatten(-1, (4, 2))) * turns).flatten(-2)
            for item in (q, k)
        )
        seen = (place[None] <= place[:, None]) & attention_mask.bool()[:, None, None]
        q, k, v = (item.transpose(1, 2) for item in (q, k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, seen)
        logits: torch.Tensor = self.head(x + mixed.transpose(1, 2).flatten(2))
        return logits


@pytest.mark.slow
def test_a_decoder_with_complex_rotary_positions_generates_what_the_model_does() -> None:
    model = Rotated().eval()
    mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    example = {"ids": torch.arange(12).reshape(2, 6) % 11, "attention_mask": mask}
    engine = bg.compile(model, example=example, backend=Onnx(generate=True))
    prompts = [[1, 2, 3, 4], [5, 6]]
    for prompt, found in zip(prompts, engine.generate(prompts, max_new_tokens=6)):
        texts = list(prompt)
        for _ in range(6):
            logits = model(torch.tensor([texts]), torch.ones(1, len(texts), dtype=torch.long))
            texts.append(int(logits[0, -1].argmax()))
        assert found == texts[len(prompt) :]
