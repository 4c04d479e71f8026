"""Lowering to ONNX models for ONNX Runtime."""
