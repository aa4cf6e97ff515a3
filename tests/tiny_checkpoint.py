"""Tiny checkpoints with a tokenizer, as ``save_pretrained`` leaves them: loaded in no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import models

# One token per byte, then the special ones.
SPECIAL = ("<s>", "</s>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def byte_tokenizer(*, template: str | None = TEMPLATE, extra: int = 0) -> Any:
    """Return a tokenizer of 256 bytes, the special tokens and `extra` more."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL[2:])})
    fast.add_tokens([f"<extra{index}>" for index in range(extra)])
    fast.chat_template = template
    return fast


def save_checkpoint(directory: Path, *, template: str | None = TEMPLATE, extra: int = 0, **config: Any) -> Path:
    """Write a tiny Llama and its tokenizer; `config` changes fields of the model's config."""
    tokenizer = byte_tokenizer(template=template, extra=extra)
    # No token without a text: answers are then different wherever their tokens are.
    values = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **config,
    }
    models.llama(**values).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
