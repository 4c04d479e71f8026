"""Pages of documentation: the code in them, which tests run as it stands there."""

from __future__ import annotations

import re
import tomllib

from tests.helpers.paths import ROOT


def code_of(page: str, heading: str = "", language: str = "python") -> str:
    """The first block of code under a heading of a page in docs/, or of the whole page."""
    text = (ROOT / "docs" / page).read_text()
    if heading:
        text = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    blocks = re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)
    return str(blocks[0])


def entry_points_of(page: str, heading: str) -> str:
    """The entry points under a heading, as an installed package declares them."""
    groups = tomllib.loads(code_of(page, heading, "toml"))["project"]["entry-points"]
    return "".join(
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
        for group, points in groups.items()
    )
