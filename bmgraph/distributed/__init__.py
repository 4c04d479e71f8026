"""Communication between ranks outside graphs."""
