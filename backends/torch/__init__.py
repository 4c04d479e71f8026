"""Lowering to torch: a trainer when an optimizer is given, an engine otherwise."""
