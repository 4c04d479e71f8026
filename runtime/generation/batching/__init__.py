"""Continuous batching: requests join and leave a batch of rows between the steps of its decoder."""
