"""The step graph: forward, loss and backward in one graph, and how it runs."""
