"""Passes that attach deltas of one family each; what they share stands in `delta_pass.py` and `site_choice.py`."""
