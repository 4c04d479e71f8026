"""SoftTokens: train embeddings of the soft tokens of a template, which stand anywhere in a text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.token_values import ids_of
from bmgraph.deltas.backbone import check_backbone_frozen, freeze_backbone
from bmgraph.deltas.prompt_networks import network
from bmgraph.deltas.soft_tokens import add_soft_tokens, soft_parameter, vectors_of, word_lookups
from bmgraph.deltas.whole_modules import module_tensors
from bmgraph.errors import InputError, PassError, VerificationError
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import SOFT_TOKENS
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.passes.deltas.delta_pass import let_train
from bmgraph.verify.proof import Proof
from bmgraph.verify.reference_outputs import Batch

aten = torch.ops.aten

SLACK = 10
"""How much more than rounding outputs may differ."""

LONGEST_LSTM = 128
"""How many tokens an LSTM is written out for."""


@dataclass(frozen=True, repr=False)
class SoftTokens(ModelPass):
    """Train embeddings of soft tokens, the ids -1, -2, ... of a template's prompts, and freeze everything else.

    words: for each soft token the id whose embedding it starts as, or None for that of a random token drawn with `seed`; a template
    knows them: `SoftTokens(task.template.soft_words)`. encoder: "mlp" or "lstm" make the embeddings of others while they train
    (P-tuning); engines and folders of deltas hold what these make. modules_to_save: modules that train whole beside them.

    Texts without soft tokens are what they were. Raises PassError where no input of ids is looked up in one table. Source: Liu et al.
    2021 (arXiv:2103.10385).

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.passes import SoftTokens
        >>> program = bg.capture(torch.nn.Embedding(9, 4), (torch.randint(0, 9, (2, 6)),))
        >>> tuned = bg.Pipeline([SoftTokens((5, None))]).run(program)
        >>> found = tuned(input=torch.tensor([[3, -1], [5, -2]]))["output"]
        >>> torch.equal(found[0, 1], found[1, 0])
        True
    """

    effect: ClassVar[Effect] = "exact"
    changes: ClassVar[frozenset[str]] = frozenset({"frozen"})
    provides: ClassVar[frozenset[str]] = frozenset({"soft-tokens"})  # no "delta", which `Merge` folds
    conflicts: ClassVar[frozenset[str]] = frozenset({"soft-tokens", "prompted"})

    words: tuple[int | None, ...] = ()
    encoder: Literal["none", "mlp", "lstm"] = "none"
    seed: int = field(default=0, kw_only=True)
    modules_to_save: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.words:
            raise InputError("words=(): give for each soft token an id, or None, as template.soft_words does")
        if any(word is not None and word < 0 for word in self.words):
            raise InputError(f"words={self.words!r}: give ids from 0 on, or None")
        if self.encoder == "lstm" and len(self.words) > LONGEST_LSTM:
            raise InputError(
                f"an LSTM takes {LONGEST_LSTM} soft tokens at most, and these are {len(self.words)}: use encoder='mlp'"
            )

    def run(self, program: Program, context: Context) -> Program:
        """Add the embeddings to the lookup of words."""
        let_train(program, module_tensors(program, self.modules_to_save, "modules_to_save"), context)
        site = add_soft_tokens(
            program, len(self.words), lambda editor, lookup: self._vectors(editor, lookup), str(self)
        )
        context.edited(site, f"{len(self.words)} soft tokens", (site,))
        freeze_backbone(program)
        return program

    def _vectors(self, editor: Editor, lookup: fx.Node) -> fx.Node:
        """The node of the embeddings [K, d]."""
        start = self._start(editor.program, lookup)
        count, width = start.shape
        generator = torch.Generator().manual_seed(self.seed)

        def call(target: Any, *args: Any) -> fx.Node:
            made = editor.call(target, *args, like=lookup, part=SOFT_TOKENS)
            made.meta["site"] = vectors.meta["site"]
            return made

        def parameter(name: str, shape: tuple[int, ...], bound: float) -> fx.Node:
            value = bound * (2 * torch.rand(shape, generator=generator) - 1)
            return soft_parameter(editor, lookup, value.to(start), f"soft_{name}")

        vectors = soft_parameter(editor, lookup, start)
        return network(self.encoder, vectors, count, width, call, parameter)

    def _start(self, program: Program, lookup: fx.Node) -> torch.Tensor:
        """Initial values: rows of the embedding table, [K, d]."""
        table: Any = lookup.args[0]
        rows, width = table.meta["val"].shape
        given = [word for word in self.words if word is not None]
        if given and max(given) >= rows:
            raise PassError(
                f"words={self.words!r} holds the id {max(given)}, and the model's embeddings have {rows} rows"
            )
        if program.device.type == "meta":
            return torch.empty(len(self.words), width, dtype=table.meta["val"].dtype, device="meta")
        drawn = torch.randint(
            rows, (len(self.words),), generator=torch.Generator().manual_seed(self.seed)
        ).tolist()
        chosen = [random if word is None else word for word, random in zip(self.words, drawn)]
        return evaluate(program, table)[torch.tensor(chosen, device=program.device)].clone()

    def prove(self, before: Program, after: Program, proof: Proof, context: Context) -> None:
        """Texts with soft tokens must be what texts with the words are whose embeddings the tokens have."""
        check_backbone_frozen(after)
        vectors, lookups = vectors_of(after), word_lookups(before)
        if vectors is None or len(vectors) != len(self.words):
            raise VerificationError(f"it has not {len(self.words)} soft tokens")
        table, source = evaluate(before, lookups[0].args[0]), ids_of(lookups[0])  # type: ignore[arg-type]
        if {user for user in source.users if user.target is not aten.sym_size.int} != set(lookups):
            return  # what else the model computes from ids is not that of the words
        if self.encoder == "none":
            words = [int((table == row).all(-1).int().argmax()) for row in vectors]
        else:
            words = list(range(min(len(vectors), len(table))))
            after = _with_vectors(after, table[words])

        def softened(batch: Batch) -> dict[str, torch.Tensor]:
            ids = batch[str(source.target)]
            for number, word in enumerate(words):
                ids = torch.where(ids == word, -1 - number, ids)
            return {**batch, str(source.target): ids}

        what = "a text with soft tokens is not the text with the words whose embeddings they have"
        proof.same_values(after, before, softened, lambda outputs: outputs, what, SLACK)


def _with_vectors(program: Program, value: torch.Tensor) -> Program:
    """A copy whose soft tokens have other embeddings, without what computes them."""
    copy = program.clone()
    for node in copy.graph.nodes:
        if node.meta.get("part") == SOFT_TOKENS and node.target is aten.embedding.default:
            copy.parameters["replaced.soft_tokens"] = value
            with copy.graph.inserting_before(node):
                read = copy.graph.get_attr("replaced.soft_tokens")
            read.meta["val"] = node.args[0].meta["val"]
            node.update_arg(0, read)
    return copy
