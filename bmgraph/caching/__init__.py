"""A decoder with a cache of keys and values: which parts of its graph see new tokens, which see all."""
