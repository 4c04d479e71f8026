"""Whether a program is still the same model."""
