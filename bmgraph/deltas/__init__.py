"""Deltas and soft prompts: their form in a graph and their file formats."""
