"""Text generation on any engine with a KV cache."""
