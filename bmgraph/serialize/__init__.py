"""Files: atomic writing, and reading without trust in the contents."""
