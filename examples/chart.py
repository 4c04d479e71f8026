"""Draws a small line chart as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

COLORS = ("#2563eb", "#059669", "#dc2626", "#7c3aed")
WIDE, HIGH, LEFT, TOP, PLOT_WIDE, PLOT_HIGH = 640, 400, 70, 50, 440, 280


def line_chart(
    path: Path,
    title: str,
    axes: tuple[str, str],
    curves: Mapping[str, Sequence[tuple[float, float]]],
    top: float,
) -> None:
    """Write curves of points (x from 0 to 1, y from 0 to `top`), with both axes labelled in percent."""

    def at(x: float, y: float) -> str:
        return f"{LEFT + PLOT_WIDE * x:.1f},{TOP + PLOT_HIGH * (1 - min(y, top) / top):.1f}"

    def text(x: float, y: float, words: str, more: str = "") -> str:
        return f'<text x="{x:.0f}" y="{y:.0f}" {more}>{words}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {HIGH}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        text(LEFT, 25, title, 'font-size="15" font-weight="bold"'),
        text(LEFT + PLOT_WIDE / 2, HIGH - 20, axes[0], 'text-anchor="middle"'),
        text(LEFT, TOP - 10, axes[1]),
    ]
    for step in range(5):
        share = step / 4
        for ends in ((share, 0.0, share, top), (0.0, share * top, 1.0, share * top)):
            points = f"{at(*ends[:2])} {at(*ends[2:])}"
            parts.append(f'<polyline points="{points}" fill="none" stroke="#e5e7eb"/>')
        parts.append(
            text(LEFT + PLOT_WIDE * share, TOP + PLOT_HIGH + 18, f"{share:.0%}", 'text-anchor="middle"')
        )
        parts.append(
            text(LEFT - 8, TOP + PLOT_HIGH * (1 - share) + 4, f"{share * top:.0%}", 'text-anchor="end"')
        )
    for index, (name, points) in enumerate(curves.items()):
        color = COLORS[index % len(COLORS)]
        line = " ".join(at(x, y) for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        for x, y in points:
            across, down = at(x, y).split(",")
            parts.append(f'<circle cx="{across}" cy="{down}" r="3" fill="{color}"/>')
        parts.append(text(LEFT + PLOT_WIDE + 15, TOP + 20 + 20 * index, name, f'fill="{color}"'))
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")
