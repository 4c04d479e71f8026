"""Lowering steps that all backends share."""
