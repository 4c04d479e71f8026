"""Rewrites at the edge of what they may match: half a step, an attribute, a batch that is repeated too."""

from __future__ import annotations

import numpy as np
import pytest

from bmgraph.backends.onnx.rewrites.drop_clip import drop_clips
from bmgraph.backends.onnx.rewrites.quantize_before_concat import round_before_concat
from bmgraph.backends.onnx.rewrites.share_kv_heads import share_heads
from tests.backends.onnx.test_rewrites import CLIP, CONCAT, SHARED, build, clip_arrays, floats, rewritten

STEP = 0.25
"""A power of two, so that half a step is exact."""


@pytest.mark.parametrize(
    ("low", "high", "dropped"),
    [
        (-120.0, 134.5, False),  # half a step below the last code rounds to the even one before it
        (-119.5, 135.0, True),  # half a step above the first code rounds to it
        (-120.0, 134.6, True),
        (-120.0, 300.0, True),  # beyond the last code nothing is left to clip
        (-500.0, 135.0, True),
        (-119.4, 135.0, False),
    ],
)
def test_a_clip_goes_where_its_bounds_have_the_outermost_codes(
    low: float, high: float, dropped: bool
) -> None:
    arrays = clip_arrays(low * STEP, high * STEP) | {"step": np.array(STEP, np.float32)}
    x = np.linspace(-60, 60, 4 * 2001, dtype=np.float32).reshape(-1, 4)
    count, _, before, after = rewritten(drop_clips, CLIP, arrays, {"x": x})
    assert count == dropped
    np.testing.assert_array_equal(after, before)


def test_rounding_keeps_its_attributes() -> None:
    text = CONCAT.replace("QuantizeLinear(c, step, zero)", "QuantizeLinear <output_dtype: int = 3> (c, step)")
    text = text.replace("(q, step, zero)", "(q, step)")
    arrays = {"step": np.array(0.05, np.float32)}
    feeds = {"x": floats(3, 4), "z": floats(3, 6)}
    count, _, before, after = rewritten(round_before_concat, text, arrays, feeds)
    assert count == 1
    assert before.min() < 0
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("shape", ["1, 2, 5, 8", "3, 2, 1, 8"])
def test_heads_that_are_not_all_that_is_repeated_stay(shape: str) -> None:
    text = SHARED.replace("float[3, 2, 5, 8] k", f"float[{shape}] k").replace(
        "float[3, 2, 5, 8] v", f"float[{shape}] v"
    )
    arrays = {"axis": np.array([2]), "spread": np.array([3, 2, 2, 5, 8]), "joined": np.array([3, 4, 5, 8])}
    assert share_heads(build(text, **arrays)) == 0
