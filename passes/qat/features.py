"""What passes say of programs that train in codes."""

TRAINS_IN_CODES = "trains in codes"
"""Provided by a pass after which weights are rounded at every step of training."""
