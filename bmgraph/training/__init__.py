"""Training: the step graph (forward, loss and backward in one graph), its execution, and what updates parameters."""
