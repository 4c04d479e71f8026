"""A server for clients of OpenAI's API: completions, chat and embeddings from saved engines, with deltas as models."""
