"""Every experiment runs in small: its own settings and rotary scaling, on a tiny random model of its family."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from apb_ds.config import from_mapping
from apb_ds.loading import ModelConfig, load_model
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.plan import Plan, plan_request
from apb_ds.session import Job, Session, read_settings
from apb_ds.tasks.passkey import RANDOM_QUERY_TOKENS
from apb_ds.tasks.synthetic.draws import Draws
from apb_ds.training.config import InstrumentConfig
from apb_ds.training.mixture import Mixture

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TRAINED = ("smollm2_ruler",)  # for launch/train_instrument.py
EXPS = sorted(file.stem for file in (CONFIGS / "exp").glob("*.yaml") if file.stem not in (*TRAINED, "smollm2_heads"))
ANCHOR_LENGTH = 48  # what every experiment's anchor is scaled to: room for the task's query and for some document
KV_HEADS = 2
HEAD_DIM = 8


@pytest.fixture(scope="module", autouse=True)
def hydra_configs() -> Iterator[None]:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


def composed(*overrides: str) -> dict[str, Any]:
    container = OmegaConf.to_container(compose("infer", list(overrides)), resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def planned(values: dict[str, Any]) -> Plan:
    return plan_request(read_settings(values).method, values["task"]["num_tokens"], RANDOM_QUERY_TOKENS)


def tiny(exp: str) -> dict[str, Any]:
    """Compose the experiment with all lengths scaled alike, over a model with few of everything but its own groups."""
    full = composed(f"+exp={exp}")
    geometry, method = full["model"]["geometry"], full["method"]
    scale = ANCHOR_LENGTH / planned(full).anchor_length
    heads = KV_HEADS * geometry["num_attention_heads"] // geometry["num_key_value_heads"]
    shape = {
        "num_hidden_layers": 2,
        "hidden_size": HEAD_DIM * heads,
        "intermediate_size": 96,
        "num_attention_heads": heads,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": 256,
    }
    few = {"head_dim": HEAD_DIM, "num_experts": 8, "num_local_experts": 8, "moe_intermediate_size": 16}
    shape |= {field: size for field, size in few.items() if field in geometry}
    if "sliding_window_pattern" in geometry:
        shape["num_hidden_layers"] = geometry["sliding_window_pattern"] + 1  # one that sees all, and one after it
    lengths = {f"method.{key}": method[key] for key in ("anchor_length", "passing_length") if method[key] is not None}
    lengths["task.num_tokens"] = full["task"]["num_tokens"]
    changes: dict[str, Any] = {f"model.geometry.{field}": value for field, value in shape.items()}
    changes |= {path: round(scale * length) for path, length in lengths.items()}
    changes |= {"model.load_format": "dummy", "model.path": "null", "model.device": "cpu", "task.max_new_tokens": 2}
    return composed(f"+exp={exp}", *(f"{path}={value}" for path, value in changes.items()))


@pytest.mark.parametrize("exp", EXPS)
def test_a_tiny_run(exp: str) -> None:
    full = planned(composed(f"+exp={exp}"))
    session = Session(group=SequenceGroup())
    record = session.run(Job(tiny(exp)))
    session.close()
    assert record["status"] == "ok", record["error"]
    metrics = record["metrics"]
    assert record["exact"] is False
    assert (metrics["hosts"], metrics["anchor_length"]) == (full.hosts, ANCHOR_LENGTH)
    # The experiment's proportions, up to the rounding of each length to whole tokens.
    for field, length in (("passing_length", full.passing_length), ("block_length", full.block_length(0))):
        assert metrics[field] == pytest.approx(length * ANCHOR_LENGTH / full.anchor_length, abs=1), field
    assert min(metrics["kept_lengths"]) == metrics["passing_length"]
    assert 1 <= metrics["new_tokens"] <= 2
    assert all(record["kernels"][phase] for phase in ("prefill", "decode"))


@pytest.mark.parametrize("exp", EXPS)
def test_the_tiny_model_is_of_the_family(exp: str) -> None:
    model = composed(f"+exp={exp}")["model"]
    wanted = {**model["geometry"], **model["overrides"]}
    loaded = load_model(ModelConfig.from_dict(tiny(exp)["model"])).model
    config = loaded.config
    assert config.model_type == wanted["model_type"]
    assert config.max_position_embeddings == wanted["max_position_embeddings"]
    groups = wanted["num_attention_heads"] // wanted["num_key_value_heads"]
    assert config.num_attention_heads // config.num_key_value_heads == groups > 1
    for field, value in wanted["rope_parameters"].items():
        found = config.rope_parameters[field]
        assert found == value or value.items() <= found.items(), field
    rope_types = loaded.base_model.rotary_emb.rope_type
    if isinstance(rope_types, dict):  # of each kind of layers
        assert rope_types == {kind: rope["rope_type"] for kind, rope in wanted["rope_parameters"].items()}
    else:
        assert rope_types == wanted["rope_parameters"]["rope_type"]


@pytest.mark.parametrize("exp", TRAINED)
def test_what_is_to_be_trained(exp: str) -> None:
    values = OmegaConf.to_container(compose("train_instrument", [f"+exp={exp}"]), resolve=True)
    assert isinstance(values, dict)
    config = from_mapping(InstrumentConfig, values["train"], "train")
    recipes = {part.draw(Draws(exp)).kind for part in Mixture(config.mixture).parts}
    assert recipes >= {"single", "multikey_words", "multikey_uuids", "variables", "frequent_words"}
    limit = ModelConfig.from_dict(dict(values["model"])).geometry["max_position_embeddings"]
    assert config.max_length < limit and config.output == f"outputs/{exp}"


def test_training_without_an_experiment() -> None:
    values = OmegaConf.to_container(compose("train_instrument"), resolve=True)
    assert isinstance(values, dict)
    assert Mixture(from_mapping(InstrumentConfig, values["train"], "train").mixture).parts


@pytest.mark.parametrize(
    ("exp", "layer", "others"),
    [  # numbers in a layer's linear weights, and in embeddings and norms
        ("yi_34b_128k", 7168 * (2 * 7168 + 2 * 1024 + 3 * 20480), 7168 * (64000 + 2 * 60 + 1)),
        ("llama33_70b_128k", 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672), 8192 * (128256 + 2 * 80 + 1)),
    ],
)
def test_what_each_rank_will_hold_of_large_models(
    exp: str, layer: int, others: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def make_nothing(*_: Any) -> None:
        raise ValueError("made without weights")

    caplog.set_level(logging.INFO, "apb_ds")
    monkeypatch.setattr("apb_ds.loading.model.make_cut", make_nothing)
    values = composed(f"+exp={exp}", "model.shard_weights=true")["model"]
    config = ModelConfig.from_dict({**values, "path": None, "load_format": "dummy", "dtype": "bfloat16"})
    with pytest.raises(ValueError, match="made without weights"):
        load_model(config, torch.device("cpu"), SequenceGroup(rank=0, world_size=8))
    layers, vocab, hidden = (config.geometry[name] for name in ("num_hidden_layers", "vocab_size", "hidden_size"))
    part = 2 * (layers * layer + vocab * hidden) / 8
    expected = [part + 2 * others, part, 2 * others, 2 * 2 * layer]
    (message,) = caplog.messages
    found = [float(number) for number in re.findall(r"([\d.]+) GiB", message)]
    assert found == [pytest.approx(number / 2**30, rel=5e-3) for number in expected]
    assert "one of 8 parts" in message
