"""Soft prompts as a family of deltas, in PEFT's format of prompt tuning (Lester et al. 2021, arXiv:2104.08691)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from bmgraph.analysis.structure.finder import find
from bmgraph.deltas.backbone import freeze_backbone
from bmgraph.deltas.family import Delta, DeltaFamily, Part, Room, Saved
from bmgraph.deltas.file_values import check_values
from bmgraph.deltas.peft_config import SAVED, check_known
from bmgraph.deltas.prompt_insertion import insert_prompt, prompted_lookup
from bmgraph.deltas.row_prompts import COMPUTED, KEPT, USED, VECTORS, insert_row_prompts
from bmgraph.deltas.rows_in_front import (
    check_not_of_rows,
    described,
    entry_in_front,
    in_type,
    room_in_front,
    used_positions,
)
from bmgraph.deltas.soft_prompt import joined_with, prompt_in, prompt_of
from bmgraph.errors import BundleError, InputError, MisplacedError, PassError
from bmgraph.ir.node_role import PROMPT
from bmgraph.ir.pass_record import Edit
from bmgraph.ir.program import Program

if TYPE_CHECKING:
    from bmgraph.deltas.row_tables import RowTable

EMBEDDINGS = "prompt_embeddings"
"""PEFT's tensor f[n, d]; for an encoder-decoder f[2 * n, d], of which the first n are used."""

KNOWN = frozenset(
    {"num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules", "prompt_tuning_init",
     "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
)  # fmt: skip
"""Options of PEFT's configuration; how the embeddings began does not matter."""

P_TUNING = "P_TUNING"
"""PEFT's type of prompts that a network makes (Liu et al. 2021); its folders hold what that computes, which is put in front alike."""

NETWORK = frozenset(
    {"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"}
)
"""Options of that network, which no folder holds."""


@dataclass(frozen=True)
class PromptPart(Part):
    """The embeddings f[n, d] of a folder."""

    vectors: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def empty(self) -> bool:
        """Whether there are none."""
        return not self.vectors.numel()


class SoftPrompts(DeltaFamily):
    """Trained positions in front of an input's own."""

    name = "prompt"
    roles = (PROMPT, VECTORS, USED, COMPUTED, KEPT)
    table_keys = MappingProxyType({VECTORS: "vectors", USED: "used", COMPUTED: "computed", KEPT: "kept"})
    peft_type = "PROMPT_TUNING"
    also_read = (P_TUNING,)
    module_prefix = "base_model."
    takes_positions = True

    def recognise(self, graph: fx.Graph) -> list[Delta]:
        """The prompt's embeddings in front of those of the text, if there is one."""
        prompt = prompt_in(graph)
        joined = None if prompt is None else joined_with(prompt)
        if prompt is None or joined is None:
            return []
        words: Any = joined.args[0]
        site = str(prompt.meta.get("site"))
        return [Delta(self, site, words[-1], joined, "positions in front of the text, and changes no weight")]

    def saved(self, program: Program) -> Saved | None:
        """The embeddings. Raises InputError for a prompt that a KV cache has turned into keys and values."""
        check_not_of_rows(program, self)
        prompt = prompt_of(program)
        if prompt is None:
            return None
        if joined_with(prompt) is None:
            raise InputError(
                "the program has a soft prompt that is keys and values by now: save the delta before KVCache"
            )
        vectors = program.tensor(str(prompt.target))[0]
        attentions = find(program).attentions
        stacks = 2 if any(item.cross for item in attentions) else 1
        config = {
            **SAVED, "num_virtual_tokens": len(vectors), "token_dim": int(vectors.shape[1]),
            "num_layers": max(1, len(attentions)), "num_attention_heads": max((item.heads for item in attentions), default=1),
            "num_transformer_submodules": stacks, "prompt_tuning_init": "RANDOM",
            "task_type": "SEQ_2_SEQ_LM" if stacks == 2 else None,
        }  # fmt: skip
        if stacks == 2:
            vectors = torch.cat([vectors, torch.zeros_like(vectors)])
        return Saved(self, config, {EMBEDDINGS: vectors.contiguous()})

    def loaded(self, path: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> Part:
        """Read what PEFT or `saved` wrote."""
        made_by = NETWORK if config.get("peft_type") == P_TUNING else frozenset()
        check_known(path, config, KNOWN | made_by, self.name)
        value, count = tensors.pop(EMBEDDINGS, None), config.get("num_virtual_tokens")
        stacks = config.get("num_transformer_submodules") or 1
        if value is None or value.dim() != 2 or not value.is_floating_point() or not value.numel():
            raise BundleError(
                f"{path} has no embeddings of a prompt: expected {EMBEDDINGS!r} of numbers [tokens, d]"
            )
        check_values(path, EMBEDDINGS, value)
        if type(count) is not int or stacks not in (1, 2) or len(value) != count * stacks:
            raise BundleError(
                f"{path} has {len(value)} embeddings of a prompt, and its configuration says {str(count)[:80]} tokens and "
                f"{str(stacks)[:80]} stacks"
            )
        return PromptPart(self, path, {}, {}, value[:count])

    def contents(self, part: Part) -> dict[str, Any]:
        """The embeddings."""
        assert isinstance(part, PromptPart)
        return {EMBEDDINGS: part.vectors}

    def check_fits(self, program: Program, part: Part) -> None:
        """Raise MisplacedError where the program has embeddings of another width."""
        assert isinstance(part, PromptPart)
        width = int(prompted_lookup(program)[0].meta["val"].shape[-1])
        if width != part.vectors.shape[1]:
            raise MisplacedError(
                f"the delta in {part.path} is for another backbone: its prompt has {part.vectors.shape[1]} features, and the program's "
                f"embeddings {width}"
            )

    def attach(self, program: Program, part: Part, by: str) -> list[Edit]:
        """Put the embeddings in front of those of the text."""
        assert isinstance(part, PromptPart)
        if prompt_of(program) is not None:
            raise PassError("the program has a soft prompt already: load one on a program without")
        self.check_fits(program, part)
        dtype = prompted_lookup(program)[0].meta["val"].dtype
        value = part.vectors[None].to(device=program.device, dtype=dtype).contiguous()
        site = insert_prompt(program, value, by)
        freeze_backbone(program)
        return [Edit(site, f"{value.shape[1]} trainable positions prepended")]

    def attach_rows_in_front(
        self,
        program: Program,
        choice: str,
        parts: Mapping[int, Part],
        names: tuple[str, ...],
        room: Room,
        by: str,
    ) -> list[Edit]:
        """Put in front of each row the embeddings of its number, of which later ones may have `room.tokens`."""
        if prompt_of(program) is not None:
            raise PassError(
                "the program has a soft prompt already: rows choose among prompts on a program without"
            )
        vectors: dict[int, torch.Tensor] = {}
        for number, part in parts.items():
            assert isinstance(part, PromptPart)
            self.check_fits(program, part)
            vectors[number] = part.vectors
        counts = {number: len(value) for number, value in vectors.items()}
        tokens = room_in_front(counts, names, room)
        dtype = room.dtype or prompted_lookup(program)[0].meta["val"].dtype
        table = torch.zeros(len(names) + 1, tokens, next(iter(vectors.values())).shape[1], dtype=dtype)
        for number, value in vectors.items():
            table[number, : len(value)] = in_type(value, dtype, parts[number])
        used = used_positions(counts, len(names), tokens, last=False)
        site = insert_row_prompts(program, choice, table.to(program.device), used.to(program.device), by)
        return [Edit(site, described(counts, names, tokens, table.nbytes))]

    def entries_in_front(
        self, part: Part, tables: Sequence[RowTable], tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The embeddings, and that they are used."""
        assert isinstance(part, PromptPart)
        by_key = {item.key: item.name for item in tables if item.family == self.name}
        if "vectors" not in by_key:
            raise PassError(
                f"the delta in {part.path} is a soft prompt, and the engine keeps keys and values that were computed of prompts when it "
                "was compiled: name it in Deltas and compile again, or train a Prefix, which can be added"
            )
        values = {"vectors": part.vectors, "used": torch.ones(len(part.vectors))}
        return {
            by_key[key]: entry_in_front(value, tensors[by_key[key]], 0, False, part)
            for key, value in values.items()
        }

    def changed(self, program: Program, part: Part) -> Program:
        """A copy with the same embeddings; what a prompt does is proved where `SoftPrompt` adds one."""
        copy = program.clone()
        self.attach(copy, part, "")
        return copy
