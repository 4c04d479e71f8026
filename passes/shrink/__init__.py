"""Structured pruning: removes neurons and heads."""
