"""Engines that run on OpenVINO."""
