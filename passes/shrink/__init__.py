"""Structured pruning: neurons and heads are removed."""
