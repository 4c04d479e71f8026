"""Prune: which weights are kept (`patterns.py`), by what they are compared (`scores.py`), and SparseGPT's update of what is kept."""
