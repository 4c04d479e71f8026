"""Runs programs on torch within a limit of memory: weights are read from their files ahead of their use."""
