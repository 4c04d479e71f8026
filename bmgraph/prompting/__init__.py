"""Prompting: templates that turn rows of data into prompts, verbalizers that turn predicted words into classes, and tasks."""

from __future__ import annotations

from bmgraph.prompting.template import Template

__all__ = ["Template"]
