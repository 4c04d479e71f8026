"""Training in codes: weights and activations that are rounded at every step, and their codes once training is over."""
