"""Trainers, their checkpoints, and the rows of a batch that each rank takes."""
