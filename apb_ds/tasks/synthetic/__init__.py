"""Synthetic long documents with questions, for evaluation and training.

The kinds of task follow RULER (arXiv 2404.06654); texts, vocabularies and code are this package's own.
"""

from __future__ import annotations

from apb_ds.tasks.synthetic.documents import Document, Question
from apb_ds.tasks.synthetic.generate import generate
from apb_ds.tasks.synthetic.recipe import KINDS, Recipe
from apb_ds.tasks.synthetic.scoring import score
from apb_ds.tasks.synthetic.task import SyntheticConfig

__all__ = ["KINDS", "Document", "Question", "Recipe", "SyntheticConfig", "generate", "score"]
