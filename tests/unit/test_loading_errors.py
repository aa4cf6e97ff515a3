"""Damaged and unsuitable models: each message says what is wrong and what to do, in a sentence or two."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from apb_ds.loading import LoadedModel, ModelConfig, load_model
from apb_ds.loading.source import package_path
from tests import models
from tests.tiny_checkpoint import byte_tokenizer, save_checkpoint, save_gguf
from tests.unit.smollm2 import PATH, smollm2_directory

MAX_CHARACTERS = 350  # of a message, without paths
RANDOM = bytes(torch.randint(0, 256, (5000,), generator=torch.Generator().manual_seed(0)).tolist())
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
WEIGHTS, INDEX, CONFIG, TOKENIZER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "tokenizer.json",
)

SMALL = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 64}

Damage = Callable[[Path], object]


def load(directory: Path | str, **changes: Any) -> LoadedModel:
    return load_model(ModelConfig(**{"path": str(directory), "device": "cpu", **changes}))


def refusal(directory: Path | str, **changes: Any) -> str:
    """Return the message of the ValueError that loading must raise, after checking its form."""
    with pytest.raises(ValueError) as raised:
        load(directory, **changes)
    message = str(raised.value)
    assert type(raised.value) is ValueError
    assert message.startswith("model.") and "\n" not in message and "\x1b" not in message
    assert len(re.sub(r"/[\w./-]+/", "", message)) <= MAX_CHARACTERS, message
    return message


def write(name: str, content: bytes | str) -> Damage:
    return lambda directory: (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)


def cut(name: str, keep: float) -> Damage:
    def shorten(directory: Path) -> None:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: int(len(content) * keep)])

    return shorten


def change_config(**fields: Any) -> Damage:
    """Return a function that sets fields of config.json; None removes one."""

    def change(directory: Path) -> None:
        values = {**json.loads((directory / CONFIG).read_text()), **fields}
        (directory / CONFIG).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return change


def as_pickle(values: Any) -> Damage:
    def save(directory: Path) -> None:
        (directory / WEIGHTS).unlink()
        torch.save(values, directory / "pytorch_model.bin")

    return save


def pickle_of(content: bytes) -> Damage:
    def save(directory: Path) -> None:
        (directory / WEIGHTS).unlink()
        (directory / "pytorch_model.bin").write_bytes(content)

    return save


class Foreign:
    """An object that does not belong into a file of weights."""


WEIGHT_CASES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "empty": (write(WEIGHTS, b""), (WEIGHTS, "header too small")),
    "cut in the tensors": (cut(WEIGHTS, 0.6), (WEIGHTS, "not fully covered")),
    "cut in the header": (cut(WEIGHTS, 0.001), (WEIGHTS,)),
    "random": (write(WEIGHTS, RANDOM), (WEIGHTS, "header too large")),
    "a pointer": (write(WEIGHTS, LFS), (WEIGHTS, "Git LFS pointer", "git lfs pull")),
    "garbage of torch": (pickle_of(RANDOM), ("pytorch_model.bin", "neither a zip archive nor a pickle")),
    "an empty file of torch": (pickle_of(b""), ("pytorch_model.bin", "neither a zip archive nor a pickle")),
    "a pickle that breaks off": (pickle_of(b"\x80\x02}q\x00."[:-1]), ("pytorch_model.bin",)),
    "objects in a pickle": (as_pickle({"x": Foreign()}), ("pytorch_model.bin", "objects other than tensors")),
    "a list in a pickle": (as_pickle([1]), ("pytorch_model.bin", "holds a list")),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("loading_errors") / "good")


@pytest.fixture(scope="module")
def good_shards(good: Path) -> Path:
    shards = shutil.copytree(good, good.parent / "shards")
    (shards / WEIGHTS).unlink()
    vocabulary = json.loads((good / CONFIG).read_text())["vocab_size"]
    models.llama(vocab_size=vocabulary).save_pretrained(shards, max_shard_size="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    return shards


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "model")


@pytest.fixture
def shards(good_shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good_shards, tmp_path / "model")


@pytest.fixture
def tiny_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GGUF file of a tiny Llama with a byte vocabulary, and an empty cache."""
    pytest.importorskip("gguf")
    monkeypatch.setenv("APB_DS_CACHE", str(tmp_path / "cache"))
    return save_gguf(tmp_path / "tiny.gguf")


def left_in_cache(cache: Path) -> list[Path]:
    """Return the files in the cache, except for locks, which are empty."""
    return [path for path in (cache / "gguf").iterdir() if path.suffix != ".lock" or path.stat().st_size]


def test_undamaged_models_load(good: Path, good_shards: Path) -> None:
    """The models that each case damages in one place."""
    for directory in (good, good_shards):
        loaded = load(directory)
        assert loaded.model is not None and loaded.tokenizer is not None


# --- weights


@pytest.mark.parametrize("name", WEIGHT_CASES)
def test_damaged_weights(copy: Path, name: str) -> None:
    damage, parts = WEIGHT_CASES[name]
    damage(copy)
    message = refusal(copy)
    for part in (f"model.path={str(copy)!r}", str(copy), "is damaged", "copy or download", *parts):
        assert part in message, message


def test_only_the_bad_shard_is_named(shards: Path) -> None:
    first, second, *_ = sorted(path.name for path in shards.glob("*.safetensors"))
    cut(second, 0.5)(shards)
    message = refusal(shards)
    assert second in message and first not in message and "damaged" in message


def test_many_bad_shards_are_counted(shards: Path) -> None:
    files = sorted(shards.glob("*.safetensors"))
    for file in files:
        file.write_bytes(b"")
    message = refusal(shards)
    assert f"and {len(files) - 3} more" in message and files[-1].name not in message


def test_missing_shard(shards: Path) -> None:
    file = min(shards.glob("*.safetensors"))
    file.unlink()
    assert f"without {file.name}" in refusal(shards)


@pytest.mark.parametrize(
    "content",
    ["{", "", "[]", "{}", b"\xff\xfe{", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": 1}'],
)
def test_damaged_index(shards: Path, content: bytes | str) -> None:
    write(INDEX, content)(shards)
    message = refusal(shards)
    assert str(shards / INDEX) in message and "damaged" in message and "copy or download it again" in message


def test_unused_files_are_not_blamed(copy: Path) -> None:
    """A broken optimiser state or training log next to good weights."""
    (copy / "optimizer.bin").write_bytes(RANDOM)
    (copy / "trainer_state.json").write_text("{")
    assert load(copy).tokenizer is not None
    write(WEIGHTS, b"")(copy)
    message = refusal(copy)
    assert WEIGHTS in message and "optimizer" not in message and "trainer" not in message


def test_weights_of_another_shape(copy: Path) -> None:
    change_config(hidden_size=128)(copy)
    message = refusal(copy)
    for part in ("do not fit its config", "mismatched keys: lm_head.weight is", "64), not", "128)", "model.overrides"):
        assert part in message, message


def test_a_missing_package_is_not_damage(copy: Path) -> None:
    change_config(quantization_config={"quant_method": "gptq", "bits": 4})(copy)
    message = refusal(copy)
    assert "needs a package" in message and "damaged" not in message


def with_value_head(directory: Path) -> None:
    """Add what reward training leaves behind."""
    tensors = {**load_file(directory / WEIGHTS), "v_head.summary.weight": torch.ones(1, 64), "v_head.summary.bias": ONE}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


ONE = torch.ones(1)


def test_weights_without_a_place(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = load(copy).model(torch.arange(40)[None]).logits
    with_value_head(copy)
    message = refusal(copy)
    for part in ("unexpected keys: v_head.summary.bias, v_head.summary.weight", "model.ignore_keys"):
        assert part in message, message
    assert "unexpected keys: v_head.summary.weight;" in refusal(copy, ignore_keys=["*.bias"])
    message = refusal(copy, ignore_keys=["v_head.*", "value_head.*"])
    for part in (
        "'value_head.*' matches no unexpected weight",
        "v_head.summary.bias",
        "correct the pattern or leave it out",
    ):
        assert part in message, message
    caplog.clear()
    loaded = load(copy, ignore_keys=["v_head.*"])
    assert torch.equal(loaded.model(torch.arange(40)[None]).logits, plain)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "model.ignore_keys" in line and "v_head.summary.bias, v_head.summary.weight" in line


def test_a_pattern_of_needed_weights(copy: Path) -> None:
    message = refusal(copy, ignore_keys=["lm_head.*"])
    assert "'lm_head.*' matches no unexpected weight" in message and "unexpected: none" in message


@pytest.mark.parametrize("has_config", [False, True])
def test_an_adapter_for_a_model(copy: Path, has_config: bool) -> None:
    (copy / WEIGHTS).rename(copy / "adapter_model.safetensors")
    if not has_config:
        (copy / CONFIG).unlink()
    (copy / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    message = refusal(copy)
    for part in ("is an adapter", f"model.adapter={copy}", "model.path", "org/base"):
        assert part in message, message
    for content in ("{", "[]", "{}"):
        (copy / "adapter_config.json").write_text(content)
        assert f"model.adapter={copy}" in refusal(copy)


# --- config.json


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (write(CONFIG, "{"), ("is damaged", "config.json: JSONDecodeError", "copy or download")),
        (write(CONFIG, ""), ("is damaged", "config.json: JSONDecodeError")),
        (write(CONFIG, b"\xff\xfe{"), ("is damaged", "config.json: UnicodeDecodeError")),
        (write(CONFIG, "[1]"), ("is damaged", "config.json: it holds '[1]', not a mapping")),
        (write(CONFIG, "null"), ("is damaged", "config.json: it holds 'null', not a mapping")),
        (change_config(model_type="lama"), ("config.json has model_type='lama'", "Did you mean 'llama'?")),
        (change_config(model_type=5), ("config.json has model_type=5", "correct it")),
        (change_config(model_type=["llama"]), ("config.json has model_type=['llama']", "correct it")),
        (change_config(model_type=None), ("config.json has no model_type", "add", "such as llama")),
        (change_config(hidden_size="x"), ("config.json", "'hidden_size' expected int, got str", "correct")),
        (change_config(num_attention_heads=7), ("config.json", "not a multiple of the number of", "(7)")),
        (change_config(hidden_act="sillu"), ("config.json", "'sillu'", "weight files can be read")),
        (
            change_config(model_type="own", auto_map={"AutoConfig": "own.Config"}),
            ("config.json", "its own code", "model.trust_remote_code=true"),
        ),
    ],
)
def test_bad_config(copy: Path, damage: Damage, parts: tuple[str, ...]) -> None:
    damage(copy)
    message = refusal(copy)
    for part in (str(copy), *parts):
        assert part in message, message


def test_no_similar_name(copy: Path) -> None:
    change_config(model_type="zzzqqq")(copy)
    assert "Did you mean" not in refusal(copy)


def test_a_bad_config_is_not_blamed_on_other_files(copy: Path) -> None:
    change_config(model_type="lama")(copy)
    write(TOKENIZER, "{")(copy)
    write(WEIGHTS, RANDOM)(copy)
    message = refusal(copy)
    assert "model_type='lama'" in message and TOKENIZER not in message and WEIGHTS not in message


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize(
    ("model_type", "kind"),
    [
        ("t5", "encoder-decoder"),
        ("bart", "encoder-decoder"),
        ("bert", "is an encoder"),
        ("vit", "transformers has no decoder"),
    ],
)
def test_not_a_causal_model(copy: Path, model_type: str, kind: str, load_format: str) -> None:
    write(CONFIG, json.dumps({"model_type": model_type}))(copy)
    message = refusal(copy, load_format=load_format)
    for part in (f"model.path={str(copy)!r}", f"model_type={model_type!r}", kind, "use a decoder such as"):
        assert part in message, message


@pytest.mark.parametrize(
    ("geometry", "parts"),
    [
        ({"model_type": "lama"}, ("model_type='lama'", "Did you mean 'llama'?")),
        ({"model_type": "t5"}, ("model_type='t5'", "encoder-decoder")),
        ({"model_type": "llama", "hidden_size": "x"}, ("'hidden_size' expected int",)),
        ({"model_type": "llama", "hidden_act": "sillu"}, ("'sillu'", "correct")),
    ],
)
def test_bad_geometry(geometry: dict[str, Any], parts: tuple[str, ...], tmp_path: Path) -> None:
    message = refusal(tmp_path / "not-there", load_format="dummy", geometry={**SMALL, **geometry})
    for part in ("model.geometry", *parts):
        assert part in message, message


def test_a_damaged_config_does_not_fall_back_to_the_geometry(copy: Path) -> None:
    write(CONFIG, "{")(copy)
    assert "is damaged" in refusal(copy, load_format="dummy", geometry={"model_type": "llama"})


def test_bad_override(good: Path) -> None:
    message = refusal(good, overrides={"hidden_size": "x"})
    assert "model.overrides" in message and "'hidden_size' expected int" in message


# --- tokenizers


@pytest.fixture(scope="module")
def wide(good: Path) -> Path:
    """A tokenizer with 600 more ids than the good model knows, without a model."""
    byte_tokenizer(extra=600).save_pretrained(good.parent / "wide")
    return good.parent / "wide"


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_given_tokenizer_with_too_many_ids(good: Path, wide: Path, load_format: str) -> None:
    message = refusal(good, tokenizer=str(wide), load_format=load_format)
    known = load(good).model.get_input_embeddings().num_embeddings
    for part in (f"model.tokenizer={str(wide)!r}", f"model.path={str(good)!r}", "859", f"knows {known} tokens"):
        assert part in message, message


def test_given_tokenizer_and_a_geometry(good: Path, wide: Path, tmp_path: Path) -> None:
    geometry = json.loads((good / CONFIG).read_text())
    with pytest.raises(ValueError, match=r"model.tokenizer=.* does not match the model.* model.geometry knows"):
        load_model(ModelConfig(load_format="dummy", device="cpu", geometry=geometry, tokenizer=str(wide)))


def test_own_tokenizer_with_too_many_ids(good: Path, wide: Path, copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(wide / TOKENIZER, copy / TOKENIZER)
    message = refusal(copy)
    for part in (f"model.path={str(copy)!r}: its tokenizer does not match", "859", "Set model.tokenizer"):
        assert part in message, message
    with caplog.at_level(logging.WARNING, logger="apb_ds"):
        assert load(copy, load_format="dummy").tokenizer is None
    assert "does not match the model" in caplog.text


def test_the_largest_id_counts_in_a_vocabulary_with_gaps(copy: Path) -> None:
    values = json.loads((copy / TOKENIZER).read_text())
    size = len(values["model"]["vocab"])
    values["model"]["vocab"] = {
        token: index + (1000 if index == size - 1 else 0) for token, index in values["model"]["vocab"].items()
    }
    (copy / TOKENIZER).write_text(json.dumps(values))
    assert str(size - 1 + 1000) in refusal(copy)


def test_a_model_may_have_more_embeddings_than_tokens(tmp_path: Path) -> None:
    loaded = load(save_checkpoint(tmp_path / "padded", vocab_size=1024))
    assert len(loaded.tokenizer) < loaded.model.get_input_embeddings().num_embeddings == 1024  # type: ignore[arg-type]


def test_a_tokenizer_without_a_model(good: Path, tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert load(good, tokenizer=str(tmp_path / "tokenizer")).tokenizer is not None


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (write(TOKENIZER, "{"), ("tokenizer.json: JSONDecodeError",)),
        (write(TOKENIZER, ""), ("tokenizer.json: JSONDecodeError",)),
        (cut(TOKENIZER, 0.5), ("tokenizer.json: JSONDecodeError",)),
        (write(TOKENIZER, "[]"), ("tokenizer.json: it holds '[]', not a mapping",)),
        (write(TOKENIZER, "{}"), ("tokenizer.json: ",)),
        (write(TOKENIZER, RANDOM), ("tokenizer.json: UnicodeDecodeError",)),
        (write("tokenizer_config.json", "{"), ("tokenizer_config.json: JSONDecodeError",)),
    ],
)
def test_damaged_tokenizer(
    good: Path, copy: Path, caplog: pytest.LogCaptureFixture, damage: Damage, parts: tuple[str, ...]
) -> None:
    damage(copy)
    own = refusal(copy)
    given = refusal(good, tokenizer=str(copy))
    given_to_dummy = refusal(good, tokenizer=str(copy), load_format="dummy")
    for part in (f"the tokenizer in {copy} is damaged", "copy or download it again", *parts):
        assert part in own and part in given and part in given_to_dummy, own
    assert own.startswith(f"model.path={str(copy)!r}")
    assert given.startswith(f"model.tokenizer={str(copy)!r}")
    with caplog.at_level(logging.WARNING, logger="apb_ds"):
        assert load(copy, load_format="dummy").tokenizer is None
    assert "without a tokenizer" in caplog.text and parts[0] in caplog.text


def test_a_missing_tokenizer_is_not_blamed_on_other_files(good: Path, copy: Path) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    (copy / "trainer_state.json").write_text("{")
    message = refusal(copy)
    assert f"no tokenizer in {copy}" in message and "set model.tokenizer" in message and "damaged" not in message


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_missing_tokenizer_folder(good: Path, tmp_path: Path, load_format: str) -> None:
    (tmp_path / "empty").mkdir()
    for place, said in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "empty", "no tokenizer in"),
        (good / TOKENIZER, "is not a .gguf file"),
    ):
        message = refusal(good, tokenizer=str(place), load_format=load_format)
        assert message.startswith(f"model.tokenizer={str(place)!r}") and said in message


def test_missing_hub_tokenizer(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"model.tokenizer='no/such'.*Looked in.*hub cache") as raised:
        load(good, tokenizer="no/such")
    assert "dummy" not in str(raised.value), "random weights do not replace a tokenizer"


# --- model.path


def test_a_file_that_is_not_gguf(good: Path) -> None:
    message = refusal(good / WEIGHTS)
    assert f"{str(good / WEIGHTS)!r} is not a .gguf file" in message and f": {good}." in message


def test_home(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(good.parent))
    assert load("~/good", tokenizer="~/good").tokenizer is not None
    for path in ("~/nope", "~/nope.gguf", "~no-such-user/model"):
        message = refusal(path)
        assert f"model.path={path!r}" in message and "does not exist" in message
    assert str(good.parent / "nope.gguf") in refusal("~/nope.gguf")


def test_folders_without_a_model(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert "a directory without config.json, model.safetensors" in message and "save_pretrained" in message
    assert ".gguf: try" not in message
    (tmp_path / "tiny.gguf").write_bytes(RANDOM)
    assert f"It holds tiny.gguf: try model.path={tmp_path / 'tiny.gguf'}." in refusal(tmp_path)


def test_a_folder_named_like_a_gguf(good: Path, tmp_path: Path) -> None:
    assert load(shutil.copytree(good, tmp_path / "tiny.gguf")).tokenizer is not None


# --- GGUF


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("empty.gguf", b"", ("(0 bytes)", "empty file")),
        ("random.gguf", RANDOM, ("(5000 bytes)", "magic")),
        ("UPPER.GGUF", RANDOM, ("(5000 bytes)", "magic")),
        ("magic.gguf", b"GGUF", ("(4 bytes)",)),
        ("version.gguf", b"GGUF" + bytes(range(200)), ("(204 bytes)", "v50462976")),
        ("pointer.gguf", LFS, ("Git LFS pointer", "git lfs pull")),
    ],
)
def test_bad_gguf(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, parts: tuple[str, ...]
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("APB_DS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / name
    file.write_bytes(content)
    for changes, field in (({"path": str(file)}, "model.path"), ({"tokenizer": str(file)}, "model.tokenizer")):
        message = refusal(good, **changes)
        for part in (f"{field}: ", str(file), "GGUF file", *parts):
            assert part in message, message
    if content != LFS:
        assert left_in_cache(tmp_path / "cache") == []


@pytest.mark.parametrize("keep", [100, 1_500_000, 0.3])
def test_cut_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: float) -> None:
    """Cut within the fields, the vocabulary and the quantized tensors."""
    smollm2_directory()
    monkeypatch.setenv("APB_DS_CACHE", str(tmp_path / "cache"))
    content = package_path(PATH, "model.path").read_bytes()
    file = tmp_path / "cut.gguf"
    file.write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    message = refusal(file)
    for part in ("model.path: ", f"{file} ({file.stat().st_size} bytes)", "damaged or truncated"):
        assert part in message, message
    assert left_in_cache(tmp_path / "cache") == []


@pytest.mark.parametrize("keep", [0.01, 0.3, 0.6, 0.999])
def test_cut_gguf(tiny_gguf: Path, tmp_path: Path, keep: float) -> None:
    cut(tiny_gguf.name, keep)(tmp_path)
    assert f"{tiny_gguf} ({tiny_gguf.stat().st_size} bytes)" in refusal(tiny_gguf)
    assert left_in_cache(tmp_path / "cache") == []


def test_a_good_gguf_after_a_bad_one(tiny_gguf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At the same path; and a conversion that was changed is made again."""
    content = tiny_gguf.read_bytes()
    cut(tiny_gguf.name, 0.5)(tmp_path)
    refusal(tiny_gguf)
    tiny_gguf.write_bytes(content)
    assert load(tiny_gguf).tokenizer is not None
    (converted,) = left_in_cache(tmp_path / "cache")
    good = {file.name: file.read_bytes() for file in converted.iterdir()}
    weights = bytearray(good[WEIGHTS])
    weights[-1] ^= 1
    damages: dict[str, Damage] = {
        f"{WEIGHTS} has changed": write(WEIGHTS, bytes(weights)),
        f"{TOKENIZER} has changed": cut(TOKENIZER, 0.5),
        "config.json is missing": lambda directory: (directory / CONFIG).unlink(),
        "modeling.py is new": write("modeling.py", "raise SystemExit"),
        "sha256.json is missing": lambda directory: (directory / "sha256.json").unlink(),
        "sha256.json is not a mapping": write("sha256.json", "[]"),
        "cannot be read (JSONDecodeError)": write("sha256.json", "{"),
    }
    for said, damage in damages.items():
        damage(converted)
        caplog.clear()
        assert load(tiny_gguf).tokenizer is not None
        assert said in caplog.text, caplog.text
        assert {file.name: file.read_bytes() for file in converted.iterdir()} == good
        assert left_in_cache(tmp_path / "cache") == [converted]
    caplog.clear()
    assert load(tiny_gguf).tokenizer is not None and caplog.text == "", "an unchanged one is reused"


def test_only_the_owner_can_write_the_cache(tiny_gguf: Path, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        load(tiny_gguf)
    finally:
        os.umask(before)
    paths = [path for path in (tmp_path / "cache").rglob("*") if path.suffix != ".lock"]
    assert len(paths) > 4
    assert [path for path in [tmp_path / "cache", *paths] if path.stat().st_mode & 0o022] == []


def test_a_gguf_keeps_its_own_vocabulary(tiny_gguf: Path) -> None:
    """transformers adds an <|endoftext|>, for which this file has no embedding."""
    loaded = load(tiny_gguf)
    tokenizer: Any = loaded.tokenizer
    assert len(tokenizer) == loaded.model.get_input_embeddings().num_embeddings
    assert tokenizer.decode(tokenizer("a cab <|endoftext|>").input_ids) == "a cab <|endoftext|>"
    assert tokenizer.eos_token == "</s>"


def test_a_missing_gguf_package_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    def need_package(*_: Any, **__: Any) -> None:
        raise ImportError("Please install torch and gguf>=0.10.0 to load a GGUF checkpoint.\nA page of advice.")

    monkeypatch.setenv("APB_DS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", need_package)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    message = refusal(tmp_path / "model.gguf")
    for part in ("needs a package", "gguf>=0.10.0", "install it"):
        assert part in message, message
    assert "damaged" not in message and "advice" not in message
    assert left_in_cache(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("APB_DS_CACHE", str(tmp_path / "file"))
    message = refusal(tmp_path / "model.gguf")
    assert "conversion" in message and "set APB_DS_CACHE" in message


# --- memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
)
@pytest.mark.parametrize(
    ("owner", "load_format"),
    [
        ("AutoModelForCausalLM.from_pretrained", "auto"),
        ("AutoModelForCausalLM.from_config", "dummy"),
        ("AutoConfig.from_pretrained", "auto"),
        ("AutoTokenizer.from_pretrained", "auto"),
    ],
)
def test_out_of_memory(
    good: Path, monkeypatch: pytest.MonkeyPatch, owner: str, load_format: str, error: Exception
) -> None:
    def run_out(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(f"transformers.{owner}", run_out)
    for dtype, helps in (("float32", True), ("bfloat16", False)):
        with pytest.raises(torch.OutOfMemoryError) as raised:
            load(good, dtype=dtype, load_format=load_format)
        message = str(raised.value)
        for part in (
            f"out of memory while loading {good} to cpu",
            "What helps:",
            "model.shard_weights=true",
            "a device with more memory",
        ):
            assert part in message, message
        assert ("model.dtype=bfloat16" in message) is helps
        assert "damaged" not in message
