"""Text generation, whatever the engine."""
