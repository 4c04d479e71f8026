"""Sites (linears, attentions, feed-forwards, norms, ...), found in the dataflow."""
