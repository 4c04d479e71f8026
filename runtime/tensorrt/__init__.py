"""The TensorRT engine: plans, saved bundles and the hardware that they need."""
