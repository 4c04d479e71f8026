"""Prompting: templates that turn rows of data into prompts, verbalizers that turn predicted words into classes, and tasks."""

from __future__ import annotations

from bmgraph.prompting.classify import Classify
from bmgraph.prompting.few_shot import Demonstrations, FewShot
from bmgraph.prompting.generate import Generate
from bmgraph.prompting.generation_verbalizer import GenerationVerbalizer
from bmgraph.prompting.measures import Measures
from bmgraph.prompting.prototypical_verbalizer import PrototypicalVerbalizer
from bmgraph.prompting.ptr_verbalizer import PTRVerbalizer
from bmgraph.prompting.soft_verbalizer import SoftVerbalizer
from bmgraph.prompting.template import Template
from bmgraph.prompting.template_writer import TemplateWriter
from bmgraph.prompting.text_measures import TextMeasures
from bmgraph.prompting.verbalizer import Verbalizer

__all__ = [
    "Classify",
    "Demonstrations",
    "FewShot",
    "Generate",
    "GenerationVerbalizer",
    "Measures",
    "PTRVerbalizer",
    "PrototypicalVerbalizer",
    "SoftVerbalizer",
    "Template",
    "TemplateWriter",
    "TextMeasures",
    "Verbalizer",
]
