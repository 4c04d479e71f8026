"""Sweeps over many cases, of which a quick run takes a few."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sweep(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """All cases as parameters; those that are not `quick` are slow tests."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=() if case in quick else pytest.mark.slow
        )
        for case in cases
    ]
