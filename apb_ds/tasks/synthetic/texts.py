"""The words and phrases that documents are made of, read from data files. Every list is dealt out to the splits."""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

import yaml

SPLITS = ("train", "eval")


@functools.cache
def read_texts(name: str) -> Any:
    """Return the contents of ``assets/synthetic/NAME.yaml``."""
    file = resources.files("apb_ds.tasks") / "assets" / "synthetic" / f"{name}.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def dealt(items: list[str] | tuple[str, ...] | str) -> dict[str, tuple[str, ...]]:
    """Return each split's share of some items, or of the words of a text: every other one."""
    items = items.split() if isinstance(items, str) else items
    return {split: tuple(items[index :: len(SPLITS)]) for index, split in enumerate(SPLITS)}
