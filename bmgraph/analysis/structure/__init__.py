"""Finds the sites of a program (linears, attentions, feed-forwards, norms, ...) in its dataflow."""
