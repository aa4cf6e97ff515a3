"""Adapters: merging them, and messages for those that are missing, damaged or made for another model."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from apb_ds.loading import ModelConfig, load_model
from apb_ds.loading.adapter import merge_adapter
from apb_ds.loading.source import package_path
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.weights.cut import cut_rows, linears_to_cut
from tests import tiny_checkpoint

peft = pytest.importorskip("peft")
IDS = torch.arange(12).reshape(1, 12)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter that changes the model's answers."""
    return save_adapter(checkpoint, tmp_path_factory.mktemp("adapter"))


def save_adapter(checkpoint: Path, directory: Path, **config: Any) -> Path:
    model = load_model(ModelConfig(path=str(checkpoint), device="cpu")).model
    torch.manual_seed(0)
    config = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **config}
    peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config)).save_pretrained(directory)
    return directory


def load(checkpoint: Path, adapter: Path | str | None = None, group: Any = None, **values: Any) -> Any:
    config = ModelConfig(path=str(checkpoint), device="cpu", adapter=adapter and str(adapter), **values)
    return load_model(config, group=group)


@torch.no_grad()
def test_merging_gives_pefts_logits_and_keeps_the_class(checkpoint: Path, adapter: Path) -> None:
    plain = load(checkpoint).model
    expected = peft.PeftModel.from_pretrained(load(checkpoint).model, adapter)(IDS).logits
    loaded = load(checkpoint, adapter)
    torch.testing.assert_close(loaded.model(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, plain(IDS).logits, atol=1e-2)
    assert type(loaded.model) is type(plain)
    assert {name for name, _ in loaded.model.named_parameters()} == {name for name, _ in plain.named_parameters()}
    assert str(adapter) in loaded.source


def test_an_adapter_in_a_package_is_found(
    checkpoint: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "weights_of_mine"
    shutil.copytree(adapter, package / "lora")
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    loaded = load(checkpoint, "package://weights_of_mine/lora")
    expected = load(checkpoint, adapter)
    assert torch.equal(loaded.model(IDS).logits, expected.model(IDS).logits)


@torch.no_grad()
def test_the_packaged_instrument() -> None:
    """A LoRA on every linear layer of SmolLM2: merging adds the scaled product of its two matrices to each weight."""
    directory = package_path("package://apb_ds/tasks/assets/smollm2_ruler", "model.adapter")
    assert sum(file.stat().st_size for file in directory.iterdir()) < 10e6
    for file in directory.iterdir():
        assert file.stat().st_mode & 0o444 == 0o444, "all users of the installed package can read it"
    record = json.loads((directory / "training.json").read_text())
    trained = record["settings"]["train"]
    geometry = ModelConfig.from_dict(record["settings"]["model"]).geometry
    torch.manual_seed(0)
    plain = build(geometry)
    merged = merge_adapter(copy.deepcopy(plain), "package://apb_ds/tasks/assets/smollm2_ruler")
    tensors = load_file(directory / "adapter_model.safetensors")
    linear = [name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)]
    linear.remove("lm_head")
    assert len(tensors) == 2 * len(linear)
    for name in linear:
        low, high = (tensors[f"base_model.model.{name}.lora_{part}.weight"].float() for part in "AB")
        expected = plain.get_submodule(name).weight + trained["lora_alpha"] / trained["lora_rank"] * high @ low
        torch.testing.assert_close(merged.get_submodule(name).weight, expected, atol=1e-5, rtol=1e-4)


def build(geometry: dict[str, Any]) -> Any:
    values = dict(geometry)
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _without_a_tensor(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file)


def _with_another_shape(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file({**tensors, name: torch.zeros(4, 7)}, file)


def _for_other_modules(directory: Path) -> None:
    file = directory / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "target_modules": ["query_key_value"]}))


def _without_weights(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()


def _cut_short(directory: Path) -> None:
    (directory / "adapter_model.safetensors").write_bytes(b"\x00" * 16)


DAMAGES = [
    (_without_a_tensor, ("does not fit this model: it lacks", "lora_A")),
    (_with_another_shape, ("cannot apply", "made for this model")),
    (_for_other_modules, ("cannot apply", "query_key_value")),
    (_without_weights, ("is not an adapter", "adapter_model.safetensors or adapter_model.bin")),
    (_cut_short, ("cannot apply",)),
]


@pytest.mark.parametrize(("damage", "parts"), DAMAGES, ids=lambda item: getattr(item, "__name__", ""))
def test_damaged_adapters_are_named(
    checkpoint: Path, adapter: Path, tmp_path: Path, damage: Any, parts: tuple[str, ...]
) -> None:
    damaged = shutil.copytree(adapter, tmp_path / "damaged")
    damage(damaged)
    with pytest.raises(ValueError, match=r"model\.adapter=") as raised:
        load(checkpoint, damaged)
    assert all(part in str(raised.value) for part in parts)


def test_prompt_tuning_cannot_be_merged(checkpoint: Path, tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(load(checkpoint).model, config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter=.*PROMPT_TUNING.*no weights to merge"):
        load(checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("nowhere/adapter", ("Looked in", "HF_HUB_OFFLINE")),
        ("package://apb_ds/no/such", ("does not exist",)),
        ("package://not_installed_here/x", ("is not installed",)),
    ],
)
def test_messages_say_where_an_adapter_was_looked_for(
    checkpoint: Path, path: str, parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"model\.adapter=") as raised:
        load(checkpoint, path)
    assert all(part in str(raised.value) for part in parts)


def test_dummy_weights_take_no_adapter() -> None:
    with pytest.raises(ValueError, match=r"model\.adapter='x' needs real weights"):
        ModelConfig(path="x", load_format="dummy", adapter="x")


# Sizes that 2 and 4 do not divide; on 4 ranks the last has no row of `gate_proj` and `up_proj`.
ODD = {"extra": 1, "hidden_size": 38, "intermediate_size": 9, "num_attention_heads": 2, "num_key_value_heads": 1}
HEAD = ["q_proj", "v_proj", "up_proj", "down_proj", "lm_head", "embed_tokens"]
BY_ROWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 3}},
    "dora": {"use_dora": True},
    "head and embedding": {"target_modules": HEAD},
    "dora of the head": {"target_modules": ["lm_head", "o_proj"], "use_dora": True},
    "biases": {"target_modules": ["q_proj", "o_proj"], "lora_bias": True, "bias": "all"},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "a whole MLP": {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5]}},
}


@pytest.fixture(scope="module", params=["own head", "tied"])
def odd(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {**ODD, "tie_word_embeddings": request.param == "tied", "attention_bias": True, "head_dim": 14}
    return tiny_checkpoint.save_checkpoint(tmp_path_factory.mktemp("odd"), **shape)


@pytest.mark.parametrize("case", BY_ROWS)
def test_ranks_merge_the_rows_that_they_have(odd: Path, tmp_path: Path, case: str) -> None:
    adapter = save_adapter(odd, tmp_path, **BY_ROWS[case])
    whole = load(odd, adapter).model
    plain = load(odd).model.state_dict()
    assert any(not torch.equal(tensor, plain[name]) for name, tensor in whole.state_dict().items())
    for rank, world_size in ((0, 1), (1, 2), (0, 4), (3, 4)):  # the last rows are padded
        group = SequenceGroup(rank=rank, world_size=world_size)
        model = load(odd, adapter, group, shard_weights=True).model
        cut = {f"{name}.weight" for name, module in model.named_modules() if module in linears_to_cut(model)}
        mine = model.state_dict()
        assert set(mine) == set(whole.state_dict())
        for name, tensor in whole.state_dict().items():
            expected = cut_rows(tensor, rank, world_size) if name in cut else tensor
            assert torch.equal(mine[name], expected), (name, rank, world_size)
            assert name not in cut or model.get_submodule(name.removesuffix(".weight")).out_features == len(tensor)


def test_a_damaged_tensor_is_not_cut_to_fit(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(adapter, tmp_path / "damaged")
    file = damaged / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if "lora_B" in name)
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, file)
    with pytest.raises(ValueError, match=r"model\.adapter=.*cannot apply"):
        load(checkpoint, damaged, SequenceGroup(rank=0, world_size=2), shard_weights=True)


NOT_BY_ROWS: dict[str, tuple[Any, str]] = {
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa decomposes whole weights"),
    "layers": ({"layer_replication": [(0, 2), (1, 3)]}, "layer_replication adds layers"),
    "tokens of the head": (
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3]}},
        "lm_head would be changed by TrainableTokensWrapper",
    ),
    "parameters": (
        {"target_modules": [], "target_parameters": ["q_proj.weight"]},
        "q_proj would be changed by ParamWrapper",
    ),
    "kasa": ({"kasa_config": {}}, "would be changed by KasaLinearVariant"),
}


@pytest.mark.parametrize("case", NOT_BY_ROWS)
def test_what_is_not_by_rows_is_refused_by_name(
    checkpoint: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, reason = NOT_BY_ROWS[case]
    refuse(checkpoint, save_adapter(checkpoint, tmp_path, **config), reason, monkeypatch)


def test_other_kinds_of_adapters_are_refused_by_name(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = peft.LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=["v_proj"])
    peft.get_peft_model(load(checkpoint).model, config).save_pretrained(tmp_path)
    refuse(checkpoint, tmp_path, "v_proj would be changed by Linear of the type LOHA", monkeypatch)


def refuse(checkpoint: Path, adapter: Path, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that it is refused with this reason, and that nothing has been merged by then."""
    merged: list[Any] = []
    monkeypatch.setattr(peft.PeftModel, "merge_and_unload", lambda *_, **__: merged.append(1), raising=False)
    with pytest.raises(ValueError, match=rf"model\.adapter=.*{reason}.*merge_and_unload"):
        load(checkpoint, adapter, SequenceGroup(rank=1, world_size=2), shard_weights=True)
    assert not merged
