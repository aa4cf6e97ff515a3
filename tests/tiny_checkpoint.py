"""Tiny checkpoints with a tokenizer, saved by ``save_pretrained``; they load instantly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import models

# One token per byte, then special tokens.
SPECIAL = ("<s>", "</s>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def byte_tokenizer(*, template: str | None = TEMPLATE, extra: int = 0) -> Any:
    """Return a tokenizer of 256 bytes, the special tokens and `extra` others."""
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
    # Every token has a text, so that different tokens give different answers.
    values = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **config,
    }
    models.llama(**values).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_gguf(file: Path) -> Path:
    """Write a GGUF file of a tiny Llama with a byte vocabulary."""
    import gguf
    from tokenizers import pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<s>", "</s>"]
    model = models.llama(vocab_size=len(tokens))
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(model.config.max_position_embeddings)
    writer.add_embedding_length(model.config.hidden_size)
    writer.add_feed_forward_length(model.config.intermediate_size)
    writer.add_block_count(model.config.num_hidden_layers)
    writer.add_head_count(model.config.num_attention_heads)
    writer.add_head_count_kv(model.config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
