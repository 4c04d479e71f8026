"""What ranks tell each other outside of a graph."""
