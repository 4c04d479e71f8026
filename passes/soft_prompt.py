"""SoftPrompt: prepend trainable embeddings to the token embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.deltas.backbone import check_backbone_frozen, freeze_backbone
from bmgraph.deltas.prompt_insertion import insert_prompt, prompted_fills, prompted_length, prompted_lookup
from bmgraph.deltas.soft_prompt import prompt_of
from bmgraph.deltas.whole_modules import module_tensors
from bmgraph.errors import InputError, PassError, VerificationError
from bmgraph.ir.program import Program, placeholders
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.passes.deltas.delta_pass import let_train
from bmgraph.verify.proof import Proof
from bmgraph.verify.reference_outputs import Batch

aten = torch.ops.aten

SLACK = 10
"""How much more than rounding the outputs may differ in the proof: sums over more positions have another order."""


@dataclass(frozen=True, repr=False)
class SoftPrompt(ModelPass):
    """Prepend `tokens` trainable embeddings [tokens, d] to each row of token embeddings, and freeze everything else.

    They start as the embeddings of random tokens, drawn with `seed`, or as those of a text: words are its ids, as in
    `words=tokenizer("Classify this:").input_ids`, of which as many are taken as there are tokens, again from the first where they are
    fewer. Everything along the sequence grows with them:
    positions, masks (a mask input is extended with ones), token types (with the first token's type) and labels (with the
    label that the loss ignores). What the model computes from the ids themselves, such as which are padding, sees an id
    that the model treats as any other. Outputs cover only the positions of the text, so the inputs and outputs of the program
    keep their shapes; the maximum text length, where it is known, shrinks by `tokens`. In an encoder-decoder the prompt
    goes in front of the encoder's input. modules_to_save: modules that train whole beside the prompt.

    Raises PassError where no input is looked up in an embedding, the sequence length is fixed, or the values of an input
    or output at the inserted positions cannot be determined. Source: Lester et al. 2021 (arXiv:2104.08691).
    """

    effect: ClassVar[Effect] = "intended"
    changes: ClassVar[frozenset[str]] = frozenset({"frozen", "ranges"})
    provides: ClassVar[frozenset[str]] = frozenset({"prompted"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"prompted", "prefixed", "soft-tokens"})
    other_names: ClassVar[Mapping[str, str]] = MappingProxyType({"num_virtual_tokens": "tokens"})

    tokens: int = 20
    seed: int = 0
    words: tuple[int, ...] = field(default=(), kw_only=True)
    modules_to_save: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 1:
            raise InputError(f"tokens={self.tokens}: give a number of at least 1")
        if any(word < 0 for word in self.words):
            raise InputError(f"words={self.words!r}: give ids from 0 on")

    def run(self, program: Program, context: Context) -> Program:
        """Insert the prompt after the token embedding and extend the other inputs along the sequence."""
        let_train(program, module_tensors(program, self.modules_to_save, "modules_to_save"), context)
        lookup, _ = prompted_lookup(program)
        site = insert_prompt(program, self._embeddings(program, lookup), str(self))
        context.edited(site, f"{self.tokens} trainable positions prepended")
        freeze_backbone(program)
        return program

    def prove(self, before: Program, after: Program, proof: Proof, context: Context) -> None:
        """It must compute what the program computes with the tokens in front whose embeddings the prompt starts as."""
        check_backbone_frozen(after)
        lookup, source = prompted_lookup(before)
        if {user for user in source.users if user.target is not aten.sym_size.int} != {lookup}:
            return  # what else the model computes from ids is not that of the prompt's tokens
        length = prompted_length(before, source)
        fills = prompted_fills(before, lookup, source, length)
        words = _words(before, after, lookup)

        def longer(batch: Batch) -> dict[str, torch.Tensor]:
            return {
                name: _longer(batch[name], words, fills, node, source)
                for name, node in placeholders(before.graph).items()
            }

        def text(outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            for spec in before.outputs:
                for axis, dim in enumerate(spec.shape):
                    if dim == length:
                        outputs[spec.name] = outputs[spec.name].narrow(
                            axis, len(words), outputs[spec.name].shape[axis] - len(words)
                        )
            return outputs

        proof.same_values(
            before, after, longer, text, "it is not the program with the prompt's tokens in front", SLACK
        )

    def _embeddings(self, program: Program, lookup: fx.Node) -> torch.Tensor:
        """Initial values: random rows of the embedding table, [1, tokens, d]."""
        table: Any = lookup.args[0]
        count, features = table.meta["val"].shape
        if program.device.type == "meta":
            return torch.empty(1, self.tokens, features, dtype=table.meta["val"].dtype, device="meta")
        chosen = torch.randint(count, (self.tokens,), generator=torch.Generator().manual_seed(self.seed))
        if self.words:
            if max(self.words) >= count:
                raise PassError(
                    f"words={self.words!r} holds the id {max(self.words)}, and the model's embeddings have {count} rows"
                )
            chosen = torch.tensor([self.words[place % len(self.words)] for place in range(self.tokens)])
        return evaluate(program, table)[chosen.to(program.device)].clone()[None]


def _words(before: Program, after: Program, lookup: fx.Node) -> torch.Tensor:
    """The ids i64[tokens] whose embeddings the prompt starts as."""
    prompt = prompt_of(after)
    if prompt is None:
        raise VerificationError("it has no prompt")
    name = str(prompt.target)
    table = evaluate(before, lookup.args[0])  # type: ignore[arg-type]
    found = []
    for row in after.parameters[name][0]:
        equal = (table == row).all(-1)
        if not bool(equal.any()):
            raise VerificationError("the prompt does not start as embeddings of tokens")
        found.append(int(equal.int().argmax()))
    return torch.tensor(found, device=table.device)


def _longer(
    value: torch.Tensor,
    words: torch.Tensor,
    fills: dict[fx.Node, float | None],
    node: fx.Node,
    source: fx.Node,
) -> torch.Tensor:
    """An input with the positions of the prompt in front, as the user would write them."""
    if node not in fills:
        return value
    fill = fills[node]
    column = value[:, :1] if fill is None else torch.full_like(value[:, :1], fill)
    front = column.expand(-1, len(words)) if node is not source else words.to(value).expand(len(value), -1)
    return torch.cat([front, value], 1)
