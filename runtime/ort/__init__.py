"""The ONNX Runtime engine: sessions, saved bundles and the check of untrusted models."""
