"""Helpers for tests of deltas: nonzero deltas, and replay in a fresh process."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bmgraph.deltas.family import Delta
from bmgraph.ir.program import Program
from tests.helpers.processes import fresh_processes


def trained(program: Program, seed: int = 0, size: float = 0.3) -> Program:
    """The program with changed values for all trainable parameters, as if trained."""
    generator = torch.Generator().manual_seed(seed)
    moved = program.clone()
    for name, tensor in program.parameters.items():
        if name not in program.frozen:
            moved.parameters[name] = torch.randn(tensor.shape, generator=generator) * size
    return moved


def weight_change(program: Program, delta: Delta) -> torch.Tensor:
    """The change of the weight [out, in] that a low-rank delta makes: scale * B A."""
    change = delta.change(program)
    return change.numbers["scale"] * (change.tensors["b"] @ change.tensors["a"])


def replay_in_a_fresh_process(folder: Path, setup: str, model: str, arguments: str = "") -> None:
    """Replay a bundle's history on the model that code builds; `bg.replay` raises if any weight differs in a bit."""
    code = f"import bmgraph as bg\n{setup}\nbg.replay({str(folder)!r}, {model}{arguments})"
    context = fresh_processes()
    told = context.SimpleQueue()
    process = context.Process(target=_replay, args=(code, torch.get_num_threads(), told))
    process.start()
    process.join(200)
    process.kill()
    assert process.exitcode == 0, "" if told.empty() else told.get()


def _replay(code: str, threads: int, told: Any) -> None:
    torch.set_num_threads(threads)
    try:
        exec(code, {})
    except BaseException:
        told.put(traceback.format_exc()[-2000:])
        raise


class Stored(nn.Module):
    """A linear whose weight is stored [in, out]."""

    def __init__(self, features: int = 16, outputs: int = 24) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(features, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.b, x, self.w)


class Tied(nn.Module):
    """A head that shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid = nn.Embedding(40, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mid(self.embed(ids)))


def masked(program: Program, site: str, mask: torch.Tensor) -> Program:
    """The program with one weight multiplied by a frozen mask of its stored shape."""
    from bmgraph.ir.program import tensor_nodes

    changed = program.clone()
    with changed.edit(by="mask") as editor:
        weight = tensor_nodes(editor.graph)[site]
        users = list(weight.users)
        reader = editor.parameter(f"{site}_mask", mask, frozen=True, part="mask")
        product = editor.call(
            torch.ops.aten.mul.Tensor, weight, reader, like=users[0], site=site, part="weight"
        )
        for user in users:
            user.replace_input_with(weight, product)
    return changed
