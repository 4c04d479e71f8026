"""Dimensions that can only shrink together."""
