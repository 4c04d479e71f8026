"""Deltas and prompts: their form in a graph, and their file formats."""
