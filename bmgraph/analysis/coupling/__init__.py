"""Which dimensions of which tensors can only shrink together."""
