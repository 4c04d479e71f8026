"""Logits of which the largest are kept: their probabilities, and that of all others together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from bmgraph.ir.editor import Editor
from bmgraph.ir.program import output_node
from bmgraph.ir.shape_inference import value

aten = torch.ops.aten

LEAST = -1e4
"""What stands for the logarithm of 0: e to it is 0 in every dtype, and 0 times it is."""


@dataclass(frozen=True)
class Likeliest:
    """The `count` largest logits of an output of the teacher, as probabilities at `temperature`."""

    output: str
    count: int
    temperature: float

    @property
    def probabilities(self) -> str:
        """The name of the log probabilities f[..., count + 1], the last that of all other classes together."""
        return f"{self.output}, the {self.count} likeliest at {self.temperature!r}"

    @property
    def classes(self) -> str:
        """The name of the classes i32[..., count] of the others."""
        return f"{self.probabilities}: classes"

    def of(self, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        """Both by name, for logits f[..., V] with V above `count`."""
        scaled = logits.to(at_least_single(logits.dtype)) / self.temperature
        kept, classes = scaled.topk(self.count, dim=-1)
        others = scaled.scatter(-1, classes, float("-inf")).logsumexp(-1, keepdim=True)
        found = torch.cat([kept, others], -1) - scaled.logsumexp(-1, keepdim=True)
        return {self.probabilities: found.clamp(min=LEAST), self.classes: classes.to(torch.int32)}


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """float32, or what is wider."""
    return torch.promote_types(dtype, torch.float32)


def lumped_divergence(
    editor: Editor, student: fx.Node, classes: fx.Node, teacher: fx.Node, temperature: float
) -> fx.Node:
    """KL(teacher, student) at each position over the kept classes and the rest as one, times temperature squared.

    student: logits f[..., V]; classes i32[..., k]; teacher: log probabilities f[..., k + 1] at `temperature`. The rest of the
    student is summed by itself, not taken as 1 minus what is kept, which would leave rounding errors where that is nearly all.
    """
    like = output_node(editor.graph)
    student = editor.call(aten.to.dtype, student, at_least_single(value(student).dtype), like=like)
    scaled = editor.call(aten.div.Tensor, student, temperature, like=like)
    classes = editor.call(aten.to.dtype, classes, torch.int64, like=like)
    kept = editor.call(aten.gather.default, scaled, -1, classes, like=like)
    others = editor.call(aten.scatter.value, scaled, -1, classes, float("-inf"), like=like)
    rest = editor.call(aten.logsumexp.default, others, [-1], True, like=like)
    whole = editor.call(aten.logsumexp.default, scaled, [-1], True, like=like)
    mine = editor.call(aten.cat.default, [kept, rest], -1, like=like)
    mine = editor.call(aten.sub.Tensor, mine, whole, like=like)
    difference = editor.call(aten.sub.Tensor, teacher, mine, like=like)
    chances = editor.call(aten.exp.default, teacher, like=like)
    weighted = editor.call(aten.mul.Tensor, chances, difference, like=like)
    divergence = editor.call(aten.sum.dim_IntList, weighted, [-1], like=like)
    return editor.call(aten.mul.Tensor, divergence, temperature**2, like=like)
