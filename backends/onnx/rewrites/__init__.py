"""Rewrites of an `onnx_ir` model for ONNX Runtime, one per file."""
