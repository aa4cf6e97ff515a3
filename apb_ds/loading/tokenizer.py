"""Reading a model's tokenizer, and checking that the two fit."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from apb_ds.loading.config import ModelConfig
from apb_ds.loading.damage import find_damage
from apb_ds.loading.source import find_tokenizer
from apb_ds.ops.memory import is_out_of_memory
from apb_ds.utils.text import kind_and_line

# One of these holds the vocabulary; a tokenizer's other files only add to it.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
JSON_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "config.json",
)

logger = logging.getLogger(__name__)


def read_tokenizer(config: ModelConfig, directory: Path, num_embeddings: int) -> Any:
    """Return the tokenizer of `config.tokenizer`, or the one in the model's `directory`.

    Raises
    ------
    ValueError
        If it is missing, cannot be read, or has ids that the model does not know, naming the place and the file.
    """
    place = directory if config.tokenizer is None else find_tokenizer(config.tokenizer)
    return _read(config, place, num_embeddings)


def available_tokenizer(config: ModelConfig, directory: Path | None, num_embeddings: int) -> Any | None:
    """Return the tokenizer if it is on this machine and fits the model: random weights can do without one.

    A tokenizer that `config.tokenizer` names must exist and fit.
    """
    if config.tokenizer is not None:
        return _read(config, find_tokenizer(config.tokenizer), num_embeddings)
    if directory is None or not _has_vocabulary(directory):
        return None
    try:
        return _read(config, directory, num_embeddings)
    except ValueError as error:
        logger.warning("Random weights are used without a tokenizer. %s", error)
        return None


def _read(config: ModelConfig, place: Path, num_embeddings: int) -> Any:
    from transformers import AutoTokenizer

    named = f"model.path={config.path!r}" if config.tokenizer is None else f"model.tokenizer={config.tokenizer!r}"
    trust = config.trust_remote_code
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust, local_files_only=True)
    except Exception as error:  # of many kinds; the Rust tokenizers raise plain Exception
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{named}: {_explain(place, error)}") from error
    _check_ids(config, tokenizer, num_embeddings)
    # Where older checkpoints of models with images have it.
    file = place / "chat_template.json"
    if tokenizer.chat_template is None and file.is_file():
        try:
            template = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{named}: {file} cannot be read ({kind_and_line(error)}); copy it again.") from error
        if not isinstance(template, str):
            raise ValueError(f"{named}: {file} has a chat_template that is not a text; copy it again.")
        tokenizer.chat_template = template
    return tokenizer


def _explain(place: Path, error: Exception) -> str:
    """Return why this directory has no usable tokenizer, and what to do."""
    if not _has_vocabulary(place):
        return f"no tokenizer in {place} (it has no tokenizer.json); set model.tokenizer to where it is."
    damage = find_damage(place / name for name in JSON_FILES)
    if damage is not None:
        return f"the tokenizer in {place} is damaged ({damage}); copy or download it again, or set model.tokenizer."
    if "custom code" in str(error):
        return f"the tokenizer in {place} runs its own code; set model.trust_remote_code=true if you trust it."
    return (
        f"transformers cannot read the tokenizer in {place} ({kind_and_line(error)}); install what it asks for, or set "
        "model.tokenizer to one with the same vocabulary."
    )


def _has_vocabulary(directory: Path) -> bool:
    return any((directory / name).is_file() for name in VOCABULARY_FILES)


def _check_ids(config: ModelConfig, tokenizer: Any, num_embeddings: int) -> None:
    """Raise ValueError if the tokenizer has ids that the model does not know. The model may know more: padding."""
    needed = max(tokenizer.get_vocab().values(), default=-1) + 1  # vocabularies may have gaps
    if needed <= num_embeddings:
        return
    model = "model.geometry" if config.path is None else f"model.path={config.path!r}"
    place = f"{model}: its tokenizer" if config.tokenizer is None else f"model.tokenizer={config.tokenizer!r}"
    raise ValueError(
        f"{place} does not match the model: it has ids up to {needed - 1}, and {model} knows {num_embeddings} tokens "
        f"(0 to {num_embeddings - 1}). Set model.tokenizer to the model's own."
    )
