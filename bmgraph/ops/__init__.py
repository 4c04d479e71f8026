"""Operators of our own; importing this registers them with torch (namespace `bmgraph`)."""

from bmgraph.ops import quantization as quantization
