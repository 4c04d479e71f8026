"""Lowering to TensorRT: a plan for NVIDIA GPUs, built with or without one."""
