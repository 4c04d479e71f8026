"""The fastest of the backends that are installed."""
