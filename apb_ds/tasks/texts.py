"""Texts that tasks are made of, kept in data files."""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

import yaml


@functools.cache
def read_texts(name: str) -> Any:
    """Return the contents of ``assets/NAME.yaml``."""
    file = resources.files("apb_ds.tasks") / "assets" / f"{name}.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8"))
