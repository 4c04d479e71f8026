"""Canonical form: one spelling for each computation."""
