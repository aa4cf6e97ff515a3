"""Reading the tokenizer that goes with a model, and checking that it does."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from apb_ds.loading.config import ModelConfig
from apb_ds.loading.damage import find_damage
from apb_ds.loading.source import find_tokenizer
from apb_ds.ops.memory import is_out_of_memory
from apb_ds.utils.text import kind_and_line

# One of these holds the vocabulary; the rest of a tokenizer's files only add to it.
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


def read_tokenizer(config: ModelConfig, directory: Path | None) -> Any:
    """Return the tokenizer of `config.tokenizer`, or else the one in the model's `directory`.

    Raises
    ------
    ValueError
        If there is none or it cannot be read, naming the place and the file at fault.
    """
    from transformers import AutoTokenizer

    own = config.tokenizer is None
    place = directory if config.tokenizer is None else find_tokenizer(config.tokenizer)
    assert place is not None
    named = f"model.path={config.path!r}" if own else f"model.tokenizer={config.tokenizer!r}"
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=config.trust_remote_code, local_files_only=True)
    except Exception as error:  # of many kinds, of which the Rust tokenizers raise plain Exception
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{named}: {_explain(place, error)}") from error


def _explain(place: Path, error: Exception) -> str:
    """Return why there is no tokenizer in this directory, and what to do."""
    if not _has_vocabulary(place):
        return f"no tokenizer in {place} (there is no tokenizer.json); set model.tokenizer to where it is."
    damage = find_damage(place / name for name in JSON_FILES)
    if damage is not None:
        return f"the tokenizer in {place} is damaged ({damage}); copy or download it again, or set model.tokenizer."
    if "custom code" in str(error):
        return f"the tokenizer in {place} runs its own code; set model.trust_remote_code=true if you trust it."
    return (
        f"transformers cannot read the tokenizer in {place} ({kind_and_line(error)}); install what it asks for, or set "
        "model.tokenizer to one of the same vocabulary."
    )


def tokenizer_at_hand(config: ModelConfig, directory: Path | None, num_embeddings: int) -> Any | None:
    """Return the tokenizer if it is here and fits the vocabulary: random weights can do without one.

    One that `config.tokenizer` asks for must be there and fit.
    """
    if config.tokenizer is not None:
        tokenizer = read_tokenizer(config, directory)
        check_tokenizer(config, tokenizer, num_embeddings)
        return tokenizer
    if directory is None or not _has_vocabulary(directory):
        return None
    try:
        tokenizer = read_tokenizer(config, directory)
        check_tokenizer(config, tokenizer, num_embeddings)
    except ValueError as error:
        logger.warning("Random weights go without a tokenizer. %s", error)
        return None
    return tokenizer


def _has_vocabulary(directory: Path) -> bool:
    return any((directory / name).is_file() for name in VOCABULARY_FILES)


def count_ids(tokenizer: Any) -> int:
    """Return one more than the largest id that the tokenizer can give."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_tokenizer(config: ModelConfig, tokenizer: Any, num_embeddings: int) -> None:
    """Raise ValueError if the tokenizer has ids that the model does not know. The model may know more: it is padded."""
    needed = count_ids(tokenizer)
    if needed <= num_embeddings:
        return
    model = "model.geometry" if config.path is None else f"model.path={config.path!r}"
    place = f"{model}: its tokenizer" if config.tokenizer is None else f"model.tokenizer={config.tokenizer!r}"
    raise ValueError(
        f"{place} does not match the model: it has ids up to {needed - 1}, and {model} knows {num_embeddings} tokens "
        f"(0 to {num_embeddings - 1}). Set model.tokenizer to the model's own."
    )
