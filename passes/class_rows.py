"""ClassRows: give the head one trained row for each class of a soft verbalizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.deltas.backbone import check_backbone_frozen, freeze_backbone
from bmgraph.deltas.class_rows import OUTPUT, add_rows, head_of, rows_of
from bmgraph.deltas.whole_modules import module_tensors
from bmgraph.errors import InputError, PassError, VerificationError
from bmgraph.ir.program import Program, output_node
from bmgraph.ir.shape_inference import dims
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.passes.deltas.delta_pass import let_train
from bmgraph.verify.proof import Proof

aten = torch.ops.aten


@dataclass(frozen=True, repr=False)
class ClassRows(ModelPass):
    """Train a row [d], and a bias where the head of words has them, for each class, and freeze all else but other deltas.

    The program gets an output `class_scores` f[batch, sequence, C]; the logits of words, which training by a `SoftVerbalizer` does not
    need, are no output any more unless keep=True. words: for each class the ids whose mean row it starts as, or none for a random row,
    drawn with `seed`: `ClassRows(verbalizer.words)`. modules_to_save: modules that train whole beside them.

    Raises PassError where no output scores words by a linear. Source: Hambardzumyan et al. 2021 (arXiv:2101.00121).

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.passes import ClassRows
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9))
        >>> program = bg.capture(model, (torch.randint(0, 9, (2, 6)),))
        >>> tuned = bg.Pipeline([ClassRows(((3,), (4, 5)))]).run(program)
        >>> [(spec.name, spec.shape) for spec in tuned.outputs]
        [('class_scores', ('batch', 'sequence', 2))]
    """

    effect: ClassVar[Effect] = "intended"
    changes: ClassVar[frozenset[str]] = frozenset({"frozen", "types"})
    provides: ClassVar[frozenset[str]] = frozenset({"class-rows"})  # no "delta", which `Merge` folds
    conflicts: ClassVar[frozenset[str]] = frozenset({"class-rows"})

    words: tuple[tuple[int, ...], ...] = ()
    keep: bool = False
    seed: int = field(default=0, kw_only=True)
    modules_to_save: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.words) < 2:
            raise InputError(
                f"words={self.words!r}: give the ids of the words of two classes or more, as verbalizer.words does"
            )
        if any(word < 0 for ids in self.words for word in ids):
            raise InputError(f"words={self.words!r}: give ids from 0 on")

    def run(self, program: Program, context: Context) -> Program:
        """Add the rows and their output."""
        let_train(program, module_tensors(program, self.modules_to_save, "modules_to_save"), context)
        head = head_of(program)
        weight, bias = self._start(program, head)
        name = add_rows(program, head, weight, bias, self.keep, str(self))
        context.edited(name, f"rows of {len(self.words)} classes")
        freeze_backbone(program)
        return program

    def _start(self, program: Program, head: fx.Node) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Means of the rows of words, and of their biases."""
        expressions = [item for item in head.args[1:3] if isinstance(item, fx.Node)]
        rows, width = expressions[0].meta["val"].shape
        largest = max((word for ids in self.words for word in ids), default=0)
        if largest >= rows:
            raise PassError(f"words={self.words!r} holds the id {largest}, and the head scores {rows} words")
        biased = len(expressions) > 1
        if program.device.type == "meta":
            shape = len(self.words), width
            return torch.empty(shape, device="meta"), torch.empty(
                shape[:1], device="meta"
            ) if biased else None
        values = [evaluate(program, item) for item in expressions]
        spread = values[0].float().std()
        drawn = spread * torch.randn(
            len(self.words), width, generator=torch.Generator().manual_seed(self.seed)
        ).to(spread)
        weight = torch.stack(
            [
                values[0][list(ids)].mean(0) if ids else row.to(values[0])
                for ids, row in zip(self.words, drawn)
            ]
        )
        if not biased:
            return weight, None
        return weight, torch.stack(
            [values[1][list(ids)].mean() if ids else values[1].new_zeros(()) for ids in self.words]
        )

    def prove(self, before: Program, after: Program, proof: Proof, context: Context) -> None:
        """With the rows of some words, the scores must be those words' logits."""
        check_backbone_frozen(after)
        found, made, head = after.clone(), rows_of(after), head_of(before)
        if made is None:
            raise VerificationError("it added no rows of classes")
        rows = int(head.meta["val"].shape[-1])
        chosen = torch.arange(len(self.words), device=before.device) % rows
        for item, own in zip(made.args[1:], head.args[1:3]):
            found.parameters[str(item.target)] = evaluate(before, own)[chosen]  # type: ignore[union-attr,arg-type]
        proof.same(
            _words_alone(before, head, chosen),
            found,
            "the scores of classes are not those of their rows",
            slack=10,
        )


def _words_alone(program: Program, head: fx.Node, chosen: torch.Tensor) -> Program:
    """A copy whose one output is what the head gives for some words."""
    copy = program.clone()
    node = next(item for item in copy.graph.nodes if item.name == head.name)
    with copy.edit() as editor:
        ids = editor.parameter(editor.fresh("chosen_words"), chosen, like=node)
        output = output_node(copy.graph)
        picked = editor.call(aten.index_select.default, node, -1, ids, like=output, before=output)
        values: Any = output.args[0]
        output.args = ((picked, *values[len(copy.outputs) :]),)
        copy.outputs = (TensorSpec(OUTPUT, picked.meta["val"].dtype, dims(copy, picked.meta["val"])),)
        copy.losses = ()
    return copy
