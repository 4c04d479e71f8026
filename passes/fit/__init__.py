"""Choose passes by a budget of bytes or of time."""
