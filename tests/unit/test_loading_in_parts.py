"""Loading a model of which each rank keeps its rows alone, without other processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from apb_ds.loading import ModelConfig, load_model
from apb_ds.parallel.groups import SequenceGroup
from tests.tiny_checkpoint import save_checkpoint

WEIGHTS = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("stored", [(EMBEDDING,), (HEAD,), (EMBEDDING, HEAD)], ids=["embedding", "head", "both"])
def test_a_tied_head_stays_whole_wherever_it_is_stored(tmp_path: Path, stored: tuple[str, ...]) -> None:
    file = save_checkpoint(tmp_path, tie_word_embeddings=True) / WEIGHTS
    tensors = load_file(file)
    embedding = tensors.pop(EMBEDDING)
    save_file({**tensors, **{name: embedding.clone() for name in stored}}, file, metadata={"format": "pt"})
    config = ModelConfig(path=str(tmp_path), device="cpu", shard_weights=True)
    model = load_model(config, group=SequenceGroup(rank=1, world_size=2)).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, embedding)
