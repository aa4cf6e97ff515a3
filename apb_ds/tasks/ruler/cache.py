"""Prompts that were made before, kept in the user's cache: sizing them for a long context takes a while."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apb_ds.loading.gguf import cache_root

logger = logging.getLogger(__name__)


def cached(key: dict[str, Any], make: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return what `make` returns, from the cache if it was made for the same `key` before.

    A file appears whole or not at all. Where the cache cannot be written, a warning says so.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    file = cache_root() / "ruler" / f"{digest}.json"
    made = _read(file, key)
    if made is None:
        made = make()
        try:
            _write(file, {"key": key, "samples": made})
        except OSError as error:
            logger.warning("Cannot keep RULER's prompts in %s (%s); set APB_DS_CACHE.", file.parent, error)
    return made


def hash_tokenizer(tokenizer: Any) -> str:
    """Return a hash of what decides how many tokens a prompt has: vocabulary and chat template."""
    parts = [sorted(tokenizer.get_vocab().items()), tokenizer.bos_token_id, getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _read(file: Path, key: dict[str, Any]) -> list[dict[str, Any]] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or damaged: made anew
        return None
    return content["samples"] if isinstance(content, dict) and content.get("key") == key else None


def _write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, scratch = tempfile.mkstemp(prefix=f"{file.stem[:12]}.", dir=file.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            json.dump(content, stream)
        os.replace(scratch, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        raise
