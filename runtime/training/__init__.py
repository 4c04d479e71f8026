"""Trainers, their checkpoints, and each rank's share of a batch."""
