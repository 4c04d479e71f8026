"""The KV cache: a program that generates token by token."""
