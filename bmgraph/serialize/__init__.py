"""Files: writing them whole, and reading them without trust."""
