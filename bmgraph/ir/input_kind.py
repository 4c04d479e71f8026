"""What an input of a program holds, as its dataflow tells: how values of another size or another batch are made for it."""

from __future__ import annotations

from enum import StrEnum


class InputKind(StrEnum):
    """The kind of an input: B rows, S positions, P cached positions."""

    IDS = "ids"
    """Integers that are looked up in a table: token ids [B, S], the numbers of items [B]."""
    TOKEN_TYPES = "token_types"
    """Integers beside ids that are looked up in a smaller table."""
    POSITIONS = "positions"
    """Position numbers [B, S]: looked up or turned into angles."""
    MASK = "mask"
    """[B, S] of zeros and ones whose ones mark real positions."""
    INVERSE_MASK = "inverse_mask"
    """[B, S] of zeros and ones whose ones mark padding."""
    ATTENTION_BIAS = "attention_bias"
    """A mask or bias of another form, which the scores of an attention read."""
    LABELS = "labels"
    """Read by losses alone."""
    FEATURES = "features"
    """Floating-point values."""
    CACHE = "cache"
    """Keys or values of earlier positions, which the program also returns [B, heads, P, size], or what says how many there are."""
    MEMORY = "memory"
    """An output of an encoder, the same for all steps of a generation."""
    SCORED = "scored"
    """Numbers of the positions whose logits are returned."""
    CHOICE = "choice"
    """One of several names for each row: see `TensorSpec.names`."""
    OTHER = "other"
    """Nothing of these is known."""


MASKS = frozenset({InputKind.MASK, InputKind.INVERSE_MASK})
"""Kinds with a zero or a one for each position."""
