"""Loading a model of which each rank keeps its rows alone, without other processes."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import core_model_loading, modeling_utils

import apb_ds
from apb_ds.loading import LoadedModel, ModelConfig, load_model, parts
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.training.loop import load_to_train
from apb_ds.weights.cut import cut_rows, own_rows
from tests.models import build_model
from tests.tiny_checkpoint import byte_tokenizer, save_checkpoint

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


@pytest.mark.parametrize("stored", ["safetensors", "bfloat16", "bin", "another name"])
def test_a_rank_reads_its_rows_alone(tmp_path: Path, stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save_checkpoint(tmp_path, extra=1, intermediate_size=9) / WEIGHTS  # sizes that 4 does not divide
    tensors = load_file(file)
    if stored == "bin":
        file.unlink()
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    if stored == "bfloat16":
        save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    if stored == "another name":  # as a base model has been saved
        renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        save_file(renamed, file, metadata={"format": "pt"})
    copy, read = core_model_loading._materialize_copy, []

    def recorded(*arguments: Any, **keywords: Any) -> torch.Tensor:
        tensor = copy(*arguments, **keywords)
        read.append(tensor.numel())
        return tensor

    config = ModelConfig(path=str(tmp_path), device="cpu", dtype="float32")
    whole = load_model(config).model
    monkeypatch.setattr(core_model_loading, "_materialize_copy", recorded)
    for rank in range(4):
        read.clear()
        group = SequenceGroup(rank=rank, world_size=4)
        model = load_model(replace(config, shard_weights=True), group=group).model
        held = 0
        for name, module in model.named_modules():
            linear = type(module) is torch.nn.Linear
            for kind, parameter in module.named_parameters(recurse=False):
                expected = whole.get_parameter(f"{name}.{kind}")
                mine = own_rows(expected, rank, 4) if linear else expected
                assert torch.equal(parameter, cut_rows(expected, rank, 4) if linear else expected), (name, rank)
                held += mine.numel()
                assert not linear or parameter.untyped_storage().nbytes() == parameter.nbytes, "no more is kept"
        assert sum(read) == held


def test_converted_weights_are_cut_once_they_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint has each layer's gate and up projections in one tensor, and transformers splits it."""
    file = save_checkpoint(tmp_path, intermediate_size=9) / WEIGHTS
    whole = load_model(ModelConfig(path=str(tmp_path), device="cpu")).model
    tensors = load_file(file)
    for layer in range(len(whole.model.layers)):
        names = [f"model.layers.{layer}.mlp.{kind}_proj.weight" for kind in ("gate", "up")]
        tensors[f"model.layers.{layer}.mlp.both.weight"] = torch.cat([tensors.pop(name) for name in names])
    save_file(tensors, file, metadata={"format": "pt"})
    targets = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    splits = core_model_loading.WeightConverter("mlp.both.weight", targets, [core_model_loading.Chunk(dim=0)])
    monkeypatch.setattr(modeling_utils, "get_model_conversion_mapping", lambda *_: [splits])
    for rank in range(4):
        config = ModelConfig(path=str(tmp_path), device="cpu", shard_weights=True)
        model = load_model(config, group=SequenceGroup(rank=rank, world_size=4)).model
        for name in ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"):
            weight = model.get_submodule(name).weight
            assert torch.equal(weight, cut_rows(whole.get_submodule(name).weight, rank, 4))


def test_a_tied_head_of_random_weights_is_the_embedding(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tie_word_embeddings=True)
    config = ModelConfig(path=str(tmp_path), device="cpu", load_format="dummy", shard_weights=True)
    model = load_model(config, group=TwoRanks()).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


class TwoRanks(SequenceGroup):
    """The first of two ranks, without the other one, which has half as much memory."""

    def __init__(self) -> None:
        super().__init__(rank=0, world_size=2)

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, (*value[:-1], value[-1] // 2) if isinstance(value, tuple) else value]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


def load_with(memory: float, path: Path, monkeypatch: pytest.MonkeyPatch, **values: Any) -> LoadedModel:
    """Load with ``auto`` on two ranks, where so many bytes are available on this one."""
    monkeypatch.setattr(parts, "available_bytes", lambda _: int(memory))
    config = ModelConfig(path=str(path), device="cpu", shard_weights="auto", **values)
    return load_model(config, group=TwoRanks())


def shares(loaded: LoadedModel) -> bool:
    """Whether the first linear layer has half of its rows."""
    linear = loaded.model.model.layers[0].mlp.up_proj
    assert len(linear.weight) in (linear.out_features, linear.out_features // 2)
    return len(linear.weight) < linear.out_features


def test_auto_shards_what_does_not_fit_on_every_rank(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "apb_ds")
    size = sum(tensor.nbytes for tensor in load_file(checkpoint / WEIGHTS).values())
    limit = 2 * size / parts.WEIGHTS_SHARE
    for factor, expected in ((1.01, False), (0.99, True)):
        caplog.clear()
        loaded = load_with(factor * limit, checkpoint, monkeypatch)
        assert loaded.shard_weights == expected == shares(loaded)
        assert f"auto is {str(expected).lower()}: a copy of the weights takes" in caplog.messages[0]
        assert len(caplog.messages) == 1 + expected
    assert not load_with(0.51 * limit, checkpoint, monkeypatch, dtype="bfloat16").shard_weights
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # ranks share the memory of the host
    assert not load_with(2.02 * limit, checkpoint, monkeypatch).shard_weights
    assert load_with(1.98 * limit, checkpoint, monkeypatch).shard_weights


def test_auto_decides_for_random_weights(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shares(load_with(0, checkpoint, monkeypatch, load_format="dummy"))
    assert not shares(load_with(1e9, checkpoint, monkeypatch, load_format="dummy"))


def test_auto_is_false_alone_and_in_training(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "available_bytes", lambda _: 0)
    config = ModelConfig(path=str(checkpoint), device="cpu", shard_weights="auto")
    assert not load_model(config).shard_weights
    trained, _ = load_to_train(config, 8)
    assert not shares(trained)


def test_auto_is_false_where_weights_cannot_be_sharded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "apb_ds")
    build_model("gpt_oss").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert not load_with(0, tmp_path, monkeypatch).shard_weights
    assert "auto is false: weights of GptOssForCausalLM cannot be sharded: GptOssTopKRouter" in caplog.text


def test_auto_is_false_for_quantised_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "apb_ds")
    file = save_checkpoint(tmp_path) / "config.json"
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **quantised}))
    with pytest.raises(ValueError, match="needs a package"):
        load_with(0, tmp_path, monkeypatch)
    assert "auto is false: the weights are quantised" in caplog.text


def test_what_each_rank_will_hold_is_said_before_weights_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "apb_ds")
    (save_checkpoint(tmp_path) / WEIGHTS).write_bytes(b"no weights")
    for rank in (0, 1):
        with pytest.raises(ValueError, match="damaged"):
            load_model(
                ModelConfig(path=str(tmp_path), shard_weights=True), group=SequenceGroup(rank=rank, world_size=2)
            )
    assert [message[:19] for message in caplog.messages] == ["Each rank will hold"]


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_shard_weights_is_true_false_or_auto(value: Any) -> None:
    with pytest.raises(ValueError, match=r"model\.shard_weights=.* must be true, false or auto"):
        ModelConfig(path="x", shard_weights=value)
    with pytest.raises(ValueError, match=r"shard_weights=.* must be true, false or auto"):
        apb_ds.init_inference(build_model("llama"), shard_weights=value)
