"""Engines on torch."""
