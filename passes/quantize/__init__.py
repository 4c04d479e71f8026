"""Quantization: formats of codes, methods that choose codes, and rounded activations."""
