"""Operators of our own; importing this registers them with torch (namespace `bmgraph`)."""

from bmgraph.ops import attention as attention
from bmgraph.ops import experts as experts
from bmgraph.ops import mixture as mixture
from bmgraph.ops import quantization as quantization
