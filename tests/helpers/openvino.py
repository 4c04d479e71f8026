"""Whether OpenVINO is there, without importing it: what imports it first decides whether it reports home."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


def needs_openvino() -> None:
    """Skip the tests of a module where OpenVINO is not installed."""
    if find_spec("openvino") is None:
        pytest.skip("OpenVINO is not installed", allow_module_level=True)
