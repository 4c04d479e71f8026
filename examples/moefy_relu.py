"""MoEfy a trained ReLU model without retraining, and measure its quality against the share of experts active.

    python -m examples.moefy_relu --out out/moefy_relu

The 512 neurons of every feed-forward become 32 experts of 16. For each share of active experts and three routers (trained on
captured activations; an oracle that computes all experts to choose the best; untrained), the numbering of held-out antibodies
is compared with the whole model's. Writes quality.svg, error.svg and figures.json.

The oracle takes the experts with the largest outputs, layer by layer. It has the lowest error of the logits, but is not an
upper bound on accuracy after the argmax: with very few experts another choice may be right more often.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import bmgraph as bg
from bmgraph.ir.pass_record import machine
from bmgraph.passes import MoEfy
from bmgraph.verify.metrics import relative_error
from examples.antibodies import ANTIBODIES, SEEN, number, trained, variants
from examples.chart import line_chart

EXPERTS = 32
ACTIVE = (1, 2, 4, 8, 16, 32)
ROUTERS = ("oracle", "trained", "random")
SEED = 0


@dataclass(frozen=True)
class Point:
    """`agreement`: the share of residues numbered correctly; `error`: relative error of the logits to the whole model's."""

    router: str
    share: float
    agreement: float
    error: float


def measure(active: Sequence[int] = ACTIVE, variants_of_each: int = 12) -> tuple[float, list[Point]]:
    """The whole model's agreement, and a point for each router and number of active experts."""
    model = trained()
    numbering = number(model, ANTIBODIES)
    seen = variants(numbering, range(SEEN), variants_of_each, SEED)
    held_out = variants(numbering, range(SEEN, len(ANTIBODIES)), variants_of_each, SEED + 1)
    program = bg.capture(model, seen.batch)
    whole = program(**held_out.batch)["output"]
    points = []
    for router in ROUTERS:
        for count in active:
            moefied = bg.Pipeline([MoEfy(EXPERTS, count, router=router, seed=SEED)]).run(
                program, calibration=[seen.batch], max_drift=math.inf
            )
            logits = moefied(**held_out.batch)["output"]
            points.append(
                Point(router, count / EXPERTS, held_out.agreement(logits), relative_error(logits, whole))
            )
    return held_out.agreement(whole), points


def curves(points: Sequence[Point], name: str) -> dict[str, list[tuple[float, float]]]:
    """One curve for each router."""
    return {
        router: [(point.share, getattr(point, name)) for point in points if point.router == router]
        for router in ROUTERS
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="MoEfy a trained ReLU model, and plot quality against the share of experts active."
    )
    parser.add_argument("--out", type=Path, default=Path("out/moefy_relu"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    whole, points = measure()
    print(f"the whole model numbers {whole:.1%} of the residues of held-out antibodies correctly")
    print(f"{'active':>8} " + " ".join(f"{router:>22}" for router in ROUTERS))
    for count in ACTIVE:
        row = [point for point in points if point.share == count / EXPERTS]
        cells = [f"{point.agreement:8.1%} (error {point.error:4.2f})" for point in row]
        print(f"{count:>5}/{EXPERTS} " + " ".join(f"{cell:>22}" for cell in cells))
    axes = ("experts active", "residues numbered correctly")
    whole_curve = {"whole model": [(0.0, whole), (1.0, whole)]}
    title = "A MoEfied ReLU model, not retrained"
    line_chart(out / "quality.svg", title, axes, {**curves(points, "agreement"), **whole_curve}, 1.0)
    axes = ("experts active", "relative error of the logits")
    line_chart(out / "error.svg", title, axes, curves(points, "error"), 1.0)
    figures = {
        "experts": EXPERTS, "whole": whole, "points": [asdict(point) for point in points], "seed": SEED,
        "seconds": time.perf_counter() - begin, "machine": machine(),
    }  # fmt: skip
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {out}/quality.svg, error.svg and figures.json in {figures['seconds']:.0f} s")


if __name__ == "__main__":
    main()
