"""Attacks that tests and the benchmark of attacks share."""
