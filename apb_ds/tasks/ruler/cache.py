"""Prompts made before, kept in the user's cache: fitting them to a long context takes a while."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from typing import Any

from apb_ds.loading.kept import cache_root, read_sealed, write_sealed
from apb_ds.tasks.template import ChatTokenizer

logger = logging.getLogger(__name__)


def cached(key: dict[str, Any], make: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return what `make` returns, from the cache if it was made for the same `key` before.

    Files are written atomically and checked by hash when read. If the cache cannot be written, a warning says so.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    file = cache_root() / "ruler" / f"{digest}.json"
    text = read_sealed(file)
    if text is not None:
        content = json.loads(text)
        if content["key"] == key:
            return content["samples"]
    made = make()
    try:
        write_sealed(file, json.dumps({"key": key, "samples": made}))
    except OSError as error:
        logger.warning("Cannot keep RULER's prompts in %s (%s); set APB_DS_CACHE.", file.parent, error)
    return made


def hash_tokenizer(tokenizer: Any) -> str:
    """Return a hash of what decides how many tokens a prompt has: vocabulary, and chat template with its arguments."""
    parts = [sorted(tokenizer.get_vocab().items()), tokenizer.bos_token_id, getattr(tokenizer, "chat_template", None)]
    if isinstance(tokenizer, ChatTokenizer):
        parts += [tokenizer.system, tokenizer.arguments]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
