"""Rewrites of the engine stage, one a file, over an `onnx_ir` model."""
