"""Engines on TensorRT."""
