"""Ranges of static activations against naive formulas, and what they do for a site with outliers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import InputError, ResourceError, VerificationError
from bmgraph.pass_manager.target import Target
from bmgraph.passes import Quantize
from bmgraph.passes.quantize.quantize import Quantize as Kind
from bmgraph.passes.quantize.ranges import BINS, LEAST, LEVELS, SHARES, entropy, percentile
from bmgraph.verify.measures import WeightsMoved
from bmgraph.verify.metrics import relative_error


def counted(values: torch.Tensor) -> tuple[torch.Tensor, float, float]:
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    return torch.histc(values, BINS, low, high).double(), low, high


def test_percentile_leaves_out_as_many_at_both_ends() -> None:
    values = torch.randn(101_000, generator=torch.Generator().manual_seed(0))
    values[:3] = torch.tensor([90.0, 80.0, -70.0])
    low, high = percentile(*counted(values))
    width = (90.0 + 70.0) / BINS
    for beyond, more in (
        (values < low, values < low + 1.5 * width),
        (values > high, values > high - 1.5 * width),
    ):
        assert int(beyond.sum()) <= 5 < int(more.sum())
    assert percentile(*counted(torch.linspace(-1, 3, 5000))) == (-1.0, 3.0)


def test_entropy_is_the_range_with_the_least_divergence() -> None:
    values = torch.randn(5_000, generator=torch.Generator().manual_seed(1)) ** 3
    counts, low, high = counted(values)
    width, best, found = (high - low) / BINS, math.inf, 1.0
    for share in SHARES:
        first, last = round((low * share - low) / width), round((high * share - low) / width)
        inside = counts[first:last].tolist()
        clipped = list(inside)
        clipped[0] += float(counts[:first].sum())
        clipped[-1] += float(counts[last:].sum())
        levels: dict[int, list[int]] = {}
        for place in range(len(inside)):
            levels.setdefault(place * LEVELS // len(inside), []).append(place)
        spread = [0.0] * len(inside)
        for places in levels.values():
            used = [place for place in places if inside[place] > 0]
            for place in used:
                spread[place] = sum(inside[item] for item in places) / len(used)
        divergence = sum(
            p / sum(clipped) * math.log(max(p / sum(clipped), LEAST) / max(q / sum(spread), LEAST))
            for p, q in zip(clipped, spread)
            if p > 0
        )
        if divergence < best:
            best, found = divergence, share
    assert entropy(counts, low, high) == pytest.approx((low * found, high * found))
    assert found < 0.9


def test_rare_values_no_longer_take_the_steps_of_the_others() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    x = torch.randn(4096, 16)
    rare = x.clone()
    rare[0, 0] = 400.0
    program, moved = bg.capture(model, {"input": x[:8]}), {}
    expected = program(input=x)["output"]
    for ranges in ("max", "percentile", "entropy"):
        item = Quantize("int8", activations="static", outliers=False, site_drift=10.0, ranges=ranges)
        done = bg.Pipeline([item]).run(program, calibration=[{"input": x}, {"input": rare}], max_drift=1.0)
        moved[ranges] = relative_error(done(input=x)["output"], expected)
    assert moved["percentile"] < 0.2 * moved["max"]
    assert moved["entropy"] < 0.7 * moved["max"]
    symmetric = Target("symmetric", ("static",), symmetric=True)
    item = Quantize("int8", outliers=False, ranges="percentile", site_drift=10.0)
    done = bg.Pipeline([item]).run(
        program, calibration=[{"input": x}, {"input": rare}], max_drift=1.0, target=symmetric
    )
    assert done.parameters["0.weight_input_zero"].dtype is torch.int8
    assert float(done.parameters["0.weight_input_scale"]) < 0.1


def test_what_clips_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that clips and does not say that it does is stopped."""
    x = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 300.0
    program = bg.capture(nn.Linear(16, 16), {"input": x[:8]})
    item = Quantize("int8", outliers=False, ranges="percentile", site_drift=10.0)
    done = bg.Pipeline([item]).run(program, calibration=[{"input": x}], max_drift=2.0)
    assert done.history[-1].drift is not None
    monkeypatch.setattr(Kind, "measured", property(lambda self: WeightsMoved(0.2)))
    with pytest.raises(VerificationError, match="rounding changed its activation"):
        bg.Pipeline([item]).run(program, calibration=[{"input": x}], max_drift=2.0)


def test_ranges_without_static_scales_are_refused() -> None:
    program = bg.capture(nn.Linear(16, 16), {"input": torch.randn(3, 16)})
    with pytest.raises(InputError, match="choose one of max, percentile, entropy"):
        Quantize("int8", ranges="most")
    with pytest.raises(InputError, match="ranges='entropy' are those of static scales, not of dynamic ones"):
        Quantize("int8", activations="dynamic", ranges="entropy")
    with pytest.raises(ResourceError, match="activations are dynamic here: give calibration batches"):
        bg.Pipeline([Quantize("int8", ranges="entropy")]).run(program)
