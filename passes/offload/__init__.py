"""Offload: keep tensors of a training step outside of the memory that it computes in."""
