"""The names of the inputs and outputs that a KV cache adds to a program, and of their sizes."""

PAST, SCORED_SIZE = "past", "scored"
"""The number of cached positions, and of positions to score."""

PAST_PREFIX, PRESENT_PREFIX, MEMORY_PREFIX = "past_", "present_", "memory_"
"""What the names of a cache's inputs, of its outputs and of encoder outputs begin with."""

ROW_MASK = "decoder_mask"
"""The mask i64[B, P + S] that a decoder behind an encoder gets where it has none."""

SCORED = "scored_positions"
"""The input i64[scored] that says which of the new positions to compute logits of."""
