"""The contract of a pass, and how passes run."""
