"""Rotate: the pass in `rotate.py`, and its helpers."""
