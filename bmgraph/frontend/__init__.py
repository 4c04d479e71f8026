"""Capture: from an eager module to a program in canonical form."""
