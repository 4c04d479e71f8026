"""Whole runs of a task: compiling, training, evaluating and measuring in one call."""
