"""Parametrizes a test over many cases, of which a quick run takes only a few."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sweep(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """All cases as parameters; those not in `quick` are marked slow."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=() if case in quick else pytest.mark.slow
        )
        for case in cases
    ]
