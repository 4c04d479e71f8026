"""Helpers for tests of training: toy models with labels, and plain PyTorch loops as references."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import nn

import bmgraph as bg
from bmgraph.analysis.weight_sites import site_value
from bmgraph.ir.program import Program
from tests.helpers.zoo import BERT_LIKE, BY_NAME, Batch, _build

IGNORED = -100
LANGUAGE = ("llama", "gpt2", "t5")
"""Toy architectures of the zoo that compute a loss from labels."""


def toy(name: str) -> nn.Module:
    """A toy language model by its zoo name; encoders get a head that computes a loss."""
    return _build("BertForMaskedLM", "BertConfig", **BERT_LIKE) if name == "bert" else BY_NAME[name].build()


@cache
def captured_to_train(name: str) -> Program:
    """A toy language model with its loss, captured once per process."""
    return bg.capture(toy(name), labelled(name, 3, 9))


def labelled(name: str, rows: int, length: int, seed: int = 0) -> Batch:
    """A batch with ragged labels: row i has 2 * i fewer (modulo the length)."""
    batch = BY_NAME[name].example(rows, length)
    generator = torch.Generator().manual_seed(seed)
    ids = batch.get("decoder_input_ids", batch["input_ids"])
    labels = torch.randint(3, 99, ids.shape, generator=generator)
    kept = torch.arange(ids.shape[1])[None] < (ids.shape[1] - torch.arange(rows) * 2 % ids.shape[1])[:, None]
    for key in ("input_ids", "decoder_input_ids"):
        if key in batch:
            batch[key] = torch.randint(3, 99, batch[key].shape, generator=generator)
    return {**batch, "labels": torch.where(kept, labels, IGNORED)}


def batches(name: str, count: int, rows: int = 5) -> list[Batch]:
    """Batches of varying lengths."""
    return [labelled(name, rows, 9 + 2 * (index % 3), seed=index) for index in range(count)]


def naive_losses(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    given: Iterable[Batch],
    loss: Callable[[nn.Module, Batch], torch.Tensor] = lambda model, batch: model(**batch)["loss"],
) -> list[float]:
    """The losses of a plain PyTorch loop in one process, a whole batch per step."""
    found = []
    for batch in given:
        optimizer.zero_grad()
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        found.append(value.item())
    return found


def eager_deltas(model: nn.Module, program: Program) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A plain PyTorch model with a program's int8 or int4 weights and deltas (scale 16 / r), and the deltas by their names in
    the program; everything else is frozen."""
    model.train().requires_grad_(False)
    deltas: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        if not hasattr(module, "weight") or isinstance(module, nn.Embedding):
            continue
        name = program.ties.get(f"{path}.weight", f"{path}.weight")
        if f"{name}_codes" in program.parameters and program.parameters[f"{name}_codes"].dim() == 3:
            module.weight.data = site_value(program, name)
        elif f"{name}_codes" in program.parameters:
            codes, scale = (program.parameters[f"{name}_{part}"] for part in ("codes", "scale"))
            per_row = codes.shape[0] == scale.numel() and isinstance(module, nn.Linear)
            module.weight.data = codes.float() * (scale[:, None] if per_row else scale)
        if f"{name}_lora_a" in program.parameters:
            names = [f"{name}_lora_{letter}" for letter in "ab"]
            deltas |= {key: nn.Parameter(program.parameters[key].clone()) for key in names}
            _add_delta(module, *(deltas[key] for key in names))
    return model, deltas


def _add_delta(module: nn.Module, a: nn.Parameter, b: nn.Parameter) -> None:
    """Make a module return x W + 16 / r * x A B."""
    plain = module.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        changed: torch.Tensor = plain(x) + 16 / a.shape[0] * (x @ a.T @ b.T)
        return changed

    module.forward = forward  # type: ignore[method-assign]
