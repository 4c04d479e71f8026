"""Prompts: pieces as rows of ids for encoders, decoders and encoder-decoders, truncated and padded to batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from bmgraph.errors import InputError
from bmgraph.prompting.rows import Row
from bmgraph.prompting.template import MASK, Piece, Template
from bmgraph.prompting.truncation import kept_tokens
from bmgraph.prompting.vocabulary import Vocabulary

MODELS = ("encoder", "decoder", "encoder-decoder")
"""Kinds of models: one that fills masks, one that continues, and one whose decoder says what stands at the masks."""

IDS, ATTENTION, SEGMENTS, DECODER_IDS = "input_ids", "attention_mask", "token_type_ids", "decoder_input_ids"


@dataclass(frozen=True)
class Prompt:
    """A row as ids. `masks` are the positions whose logits say what stands at the masks, in `decoder` if there is one."""

    ids: tuple[int, ...]
    masks: tuple[int, ...]
    decoder: tuple[int, ...] = ()


@dataclass(frozen=True)
class PromptMaker:
    """How prompts of a template are laid out.

    model: one of `MODELS`. truncate: one of `truncation.METHODS`. longest: the tokens of a prompt at most, with all around it.
    start: the id that the decoder of an encoder-decoder starts with.
    """

    template: Template
    model: str
    truncate: str = "tail"
    longest: int | None = None
    start: int | None = None

    def __post_init__(self) -> None:
        vocabulary, masks = self.template.vocabulary, self.template.masks
        if self.model == "encoder" and vocabulary.special_id(MASK) is None:
            raise InputError(
                "the tokenizer has no mask token, so no model fills masks with it: give model='decoder' or 'encoder-decoder'"
            )
        if self.model == "decoder":
            self._check_for_decoder(masks)
        if self.model == "encoder-decoder":
            self._check_for_encoder_decoder(masks)

    def _check_for_encoder_decoder(self, masks: int) -> None:
        numbered = len(self.template.vocabulary.sentinels)
        if numbered < masks and (numbered or masks > 1):
            raise InputError(
                f"the template has {masks} masks, and the tokenizer has {numbered} numbered tokens that stand for them"
            )
        if self.start is None:
            raise InputError(
                "an encoder-decoder needs the id that its decoder starts with: give start=, as in start=0"
            )

    def _check_for_decoder(self, masks: int) -> None:
        if masks > 1:
            raise InputError(
                f"the template has {masks} masks: a decoder predicts what comes next, so give one mask, at the end"
            )
        kinds = [node.kind for node in self.template.nodes]
        later = [
            node
            for node in self.template.nodes[kinds.index(MASK) :]
            if node.kind in ("placeholder", "meta", "soft")
        ]
        if later:
            raise InputError(
                f"a decoder predicts what comes next and would not see {later[0].kind} {later[0].value or ''!r} behind the mask: "
                "put the mask at the end"
            )

    def prompt(self, row: Row, index: int = 0, longest: int | None = None) -> Prompt:
        """The prompt of a row; `longest` may only lower that of the maker. Raises InputError where what cannot be shortened is
        longer, or with truncate="never" all is."""
        limit, pieces = self.limit(longest), self._filled(self.template.pieces(row, index))
        before, behind = self.template.vocabulary.around
        if self.model == "decoder":
            behind = ()
            pieces = pieces[: next(place for place, piece in enumerate(pieces) if piece.kind == MASK) + 1]
        if limit is not None:
            room = limit - len(before) - len(behind)
            pieces = _shortened(pieces, room, self.truncate, index, limit)
        return self._joined(pieces, before, behind, index)

    def limit(self, longest: int | None) -> int | None:
        """The tokens of a prompt at most, `longest` or those of the maker; None if neither says."""
        return min((limit for limit in (self.longest, longest) if limit is not None), default=None)

    def _filled(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces with ids in the place of masks."""
        ids = iter(self._mask_ids())
        return [replace(piece, ids=next(ids)) if piece.kind == MASK else piece for piece in pieces]

    def _mask_ids(self) -> list[tuple[int, ...]]:
        """What stands at each mask: nothing for a decoder, a numbered token of its own, or the mask token if there is one."""
        vocabulary, masks = self.template.vocabulary, self.template.masks
        if self.model == "encoder-decoder" and vocabulary.sentinels:
            return [(index,) for index in vocabulary.sentinels[:masks]]
        mask = None if self.model == "decoder" else vocabulary.special_id(MASK)
        return [() if mask is None else (mask,)] * masks

    def _joined(
        self, pieces: list[Piece], before: tuple[int, ...], behind: tuple[int, ...], index: int
    ) -> Prompt:
        ids, places = list(before), []
        for piece in pieces:
            if piece.kind == MASK:
                places.append(len(ids))
            ids += piece.ids
        ids += behind
        if self.model == "encoder":
            return Prompt(tuple(ids), tuple(places))
        if self.model == "decoder":
            if not ids:
                raise InputError(
                    f"row {index} has no token in front of the mask: a decoder has nothing to continue"
                )
            return Prompt(tuple(ids), (len(ids) - 1,))
        sentinels = self.template.vocabulary.sentinels[: self.template.masks]
        assert self.start is not None
        decoder = (self.start, *sentinels)
        return Prompt(tuple(ids), tuple(range(1, len(decoder))) if sentinels else (0,), decoder)

    def batch(self, prompts: Sequence[Prompt], side: str, segments: bool = False) -> dict[str, torch.Tensor]:
        """Prompts as i64[B, S], padded on one side, with their attention mask; for an encoder-decoder the decoder's ids
        i64[B, T] too; with `segments` token types of 0."""
        vocabulary = self.template.vocabulary
        batch = text_batch([prompt.ids for prompt in prompts], vocabulary, side, segments)
        if self.model == "encoder-decoder":
            batch[DECODER_IDS] = torch.tensor([prompt.decoder for prompt in prompts])
        return batch

    def positions(self, prompts: Sequence[Prompt], side: str) -> torch.Tensor:
        """The positions i64[B, M] of the masks in the padded batch."""
        found = torch.tensor([prompt.masks for prompt in prompts])
        if side == "left" and self.model != "encoder-decoder":
            lengths = torch.tensor([len(prompt.ids) for prompt in prompts])
            found += (lengths.max() - lengths)[:, None]
        return found


def text_batch(
    rows: Sequence[Sequence[int]], vocabulary: Vocabulary, side: str, segments: bool
) -> dict[str, torch.Tensor]:
    """Rows of ids as i64[B, S], with their attention mask, and with `segments` token types of 0."""
    batch = dict(zip((IDS, ATTENTION), padded(rows, vocabulary, side)))
    if segments:
        batch[SEGMENTS] = torch.zeros_like(batch[IDS])
    return batch


def padded(
    rows: Sequence[Sequence[int]], vocabulary: Vocabulary, side: str, fill: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as i64[B, S], filled up with `fill` (the padding id), and 1 where they hold ids, i64[B, S]."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), vocabulary.pad_id if fill is None else fill)
    kept = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(len(row))
        ids[index, place] = torch.tensor(row, dtype=torch.int64)
        kept[index, place] = 1
    return ids, kept


def _shortened(pieces: list[Piece], room: int, method: str, index: int, limit: int) -> list[Piece]:
    lengths, cut = [len(piece.ids) for piece in pieces], [piece.shortenable for piece in pieces]
    excess = sum(lengths) - room
    if excess <= 0:
        return pieces
    if method == "never":
        raise InputError(
            f"the prompt of row {index} has {excess} tokens more than the {limit} that are allowed: shorten the row, or let "
            "truncate= shorten it"
        )
    fixed = limit - room + sum(length for length, may in zip(lengths, cut) if not may)
    if fixed > limit:
        raise InputError(
            f"the prompt of row {index} has {fixed} tokens that may not be cut, and only {limit} are allowed: shorten the "
            'template, or say {"shortenable": True} of a part of it'
        )
    kept = kept_tokens(lengths, cut, excess, method)
    return [
        Piece(piece.kind, piece.ids[begin:end], piece.shortenable)
        for piece, (begin, end) in zip(pieces, kept)
    ]
