"""Let transformers' text-generation pipeline take an engine as its model, as it takes peft's."""

from __future__ import annotations

import sys

TASK = "text-generation"


def known_to_pipelines(name: str) -> None:
    """Add a class's name to those that wrap a model; of others the pipeline logs that it does not support them."""
    base = sys.modules.get("transformers.pipelines.base")
    names = getattr(base, "SUPPORTED_PEFT_TASKS", {}).get(TASK)
    if names is not None and name not in names:
        names.append(name)
