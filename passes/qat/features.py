"""What passes say of programs that train in codes."""

FAKE_QUANTIZED = "fake-quantized"
"""Provided by a pass after which weights are rounded at every step of training."""
