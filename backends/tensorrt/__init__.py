"""Lowering to TensorRT plans for NVIDIA GPUs; the building machine may have none."""
