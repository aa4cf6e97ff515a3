"""Write the tables of docs/models.md: ``python -m tests.conformance.write``, a few minutes."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tests.conformance.checks import Verdict, verdict_on
from tests.conformance.expected import CATEGORIES, category_of
from tests.conformance.settings import VARIANTS, WRAPPERS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- begin: python -m tests.conformance.write -->\n", "<!-- end -->\n"
CAUSAL = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MULTIMODAL = tuple(name for name in WRAPPERS if name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
KINDS = ("exact", "refused", "not built", "wrong")


def render() -> str:
    """Return the tables, in Markdown."""
    verdicts = {name: verdict_on(name) for name in CAUSAL}
    variants = {name: verdict_on(name) for name in VARIANTS}
    wrappers = {name: verdict_on(name, is_wrapper=True) for name in MULTIMODAL}
    counts = Counter(verdict.kind for verdict in verdicts.values())
    reasons = Counter(_reason(verdict) for verdict in verdicts.values() if verdict.kind == "refused")
    return "\n".join(
        [
            f"transformers {transformers.__version__}, {len(CAUSAL)} types: "
            + ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind])
            + ".",
            "",
            "| refused for | types |",
            "| --- | --- |",
            *(f"| {reason} | {count} |" for reason, count in reasons.most_common()),
            "",
            "## Causal language models",
            "",
            *_table(verdicts.items()),
            "",
            "## Settings that a default config leaves off",
            "",
            *_table(variants.items()),
            "",
            "## Multimodal models, asked about text",
            "",
            *_table(wrappers.items()),
            "",
        ]
    )


def _table(verdicts: Iterable[tuple[str, Verdict]]) -> list[str]:
    rows = (f"| {name} | {verdict.kind} | {_reason(verdict)} |" for name, verdict in verdicts)
    return ["| model type | verdict | why |", "| --- | --- | --- |", *rows]


def _reason(verdict: Verdict) -> str:
    if verdict.kind == "not built":
        line = " ".join(verdict.reason.split())
        return line if len(line) <= 120 else line[:117] + "..."
    category = category_of(verdict.reason) if verdict.kind == "refused" else None
    return CATEGORIES[category].reason if category else verdict.reason


def page_with(tables: str) -> str:
    """Return the page as it is, with these tables."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + tables + END + rest.partition(END)[2]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    PAGE.write_text(page_with(render()), encoding="utf-8")
