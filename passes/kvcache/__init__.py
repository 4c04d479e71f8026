"""The KV cache pass: turns a decoder into a program that generates token by token."""
