"""Helpers that know nothing of programs."""
