"""Checks that a program still computes what it did before a pass or lowering."""
