"""Code generation for OpenVINO."""
