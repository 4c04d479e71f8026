"""Canonical form: every computation is written in one way only."""
