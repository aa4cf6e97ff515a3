"""Every config and every experiment composes, and what it composes to is valid."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from apb_ds.config import APBConfig
from apb_ds.loading import ModelConfig
from apb_ds.plan import plan_request
from apb_ds.session import Settings, read_settings

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
QUERY_TOKENS = 64
PUBLISHED_LENGTHS = {  # l_b, l_a, l_p of the paper, H = 8
    "llama_32k": (4096, 1024, 512),
    "llama_64k": (8192, 2048, 1024),
    "llama_128k": (16384, 4096, 2048),
    "llama_256k": (32768, 8192, 4096),
    "llama_512k": (65536, 8192, 8192),
    "qwen25_14b_128k": (16384, 4096, 2048),
    "yi_34b_128k": (16384, 4096, 2048),
    "llama3_8b_1m_128k": (16384, 4096, 2048),
    "llama33_70b_128k": (16384, 4096, 2048),
    "gemma3_27b_128k": (16384, 4096, 2048),
    "gpt_oss_120b_128k": (16384, 4096, 2048),
    "qwen3_30b_a3b_128k": (16384, 4096, 2048),
}


TRAINED = ("smollm2_ruler", "smollm2_heads")  # for launch/train_instrument.py and launch/train_heads.py


def names(group: str) -> list[str]:
    return sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def hydra_configs() -> Iterator[None]:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


def values(*overrides: str) -> dict[str, Any]:
    composed = OmegaConf.to_container(compose("infer", list(overrides)), resolve=True)
    assert isinstance(composed, dict)
    return {str(key): value for key, value in composed.items()}


def settings(*overrides: str) -> Settings:
    return read_settings(values(*overrides))


# What these tasks cannot do without.
ASKED = {
    "task=prompt": ("task.document=text", "task.query=what"),
    "task=chat": ("task.document=text",),
    "task=batch": ("task.input=questions.jsonl",),
    "task=lm_eval": ("task.tasks=gsm8k",),
}


@pytest.mark.parametrize("override", ASKED)
def test_what_a_task_cannot_do_without(override: str) -> None:
    with pytest.raises(ValueError, match=r"task\.(document|input|tasks).* (empty|missing)"):
        settings(override)


@pytest.mark.parametrize(
    "override", [f"{group}={name}" for group in ("model", "method", "task", "parallel") for name in names(group)]
)
def test_every_group_option_builds(override: str) -> None:
    method = settings(override, *ASKED.get(override, ())).method
    assert method.resolved()["hosts"] == (None if method.is_exact_method else 8)


@pytest.mark.parametrize("exp", [exp for exp in names("exp") if exp not in TRAINED])
@pytest.mark.parametrize("extra", [(), ("model.load_format=dummy",)])
def test_every_exp_builds(exp: str, extra: tuple[str, ...]) -> None:
    built = settings(f"+exp={exp}", *extra)
    assert built.model.is_dummy == bool(extra)
    assert built.position_from_template


@pytest.mark.parametrize("exp", names("exp"))
def test_every_exp_holds_only_differences(exp: str) -> None:
    text = (CONFIGS / "exp" / f"{exp}.yaml").read_text()
    assert text.startswith("# @package _global_\n")
    assert "path:" not in text


@pytest.mark.parametrize(("exp", "lengths"), PUBLISHED_LENGTHS.items())
def test_published_lengths(exp: str, lengths: tuple[int, int, int]) -> None:
    built = settings(f"+exp={exp}")
    num_tokens = values(f"+exp={exp}")["task"]["num_tokens"]
    plan = plan_request(built.method, num_tokens, QUERY_TOKENS)
    block = math.ceil(num_tokens / plan.hosts)
    assert lengths[0] - 16 <= block <= lengths[0]  # at the model's limit, some positions are for query and answer
    assert (plan.anchor_length, plan.passing_length) == lengths[1:]
    assert not plan.exact


@pytest.mark.parametrize("exp", names("exp"))
def test_exp_fits_the_positions_of_its_model(exp: str) -> None:
    composed = values(f"+exp={exp}")
    model = {**composed["model"]["geometry"], **composed["model"]["overrides"]}
    needed = composed["task"]["num_tokens"] + QUERY_TOKENS + composed["task"]["max_new_tokens"]
    assert needed <= model["max_position_embeddings"]


@pytest.mark.parametrize("model", names("model"))
def test_geometry_makes_a_transformers_config(model: str) -> None:
    from transformers import AutoConfig

    geometry = dict(ModelConfig.from_dict(values(f"model={model}")["model"]).geometry)
    config = AutoConfig.for_model(geometry.pop("model_type"), **geometry)
    for field, value in geometry.items():
        if field != "rope_parameters":
            assert getattr(config, field) == value


def test_fixed_paths_reach_the_settings() -> None:
    overrides = {
        "method.hosts": 4,
        "method.anchor_length": 64,
        "method.passing_length": 32,
        "method.compressor": "recent",
        "method.schedule": "natural",
        "method.shard_anchor": False,
        "task.num_tokens": 1000,
        "task.digits": "12345",
        "task.depth": 0.5,
    }
    built = settings(*(f"{path}={value}" for path, value in overrides.items()))
    sections: dict[str, Any] = {"method": built.method, "task": built.task}
    for path, value in overrides.items():
        section, field = path.split(".")
        assert getattr(sections[section], field) == value
    assert settings("method.compression_ratio=4").method.compression_ratio == 4


def test_method_configs_list_every_field() -> None:
    for name in names("method"):
        assert set(values(f"method={name}")["method"]) == {*APBConfig.__dataclass_fields__, "retaining_heads"}


def test_star_is_a_preset() -> None:
    method = settings("method=star").method.resolved()
    assert (method["anchor_length"], method["passing_length"], method["query_in_anchor"]) == ("block", 0, False)


def test_a_given_query_position_wins_over_the_template() -> None:
    assert settings("method.query_position=16").method_for(24).query_position == 16
    assert settings().method_for(24).query_position == 24


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("method.compressor=windw", ("compressor='windw'", "Did you mean 'window'?")),
        ("method.hosts=0", ("hosts=0", "at least 1")),
        ("+method.host=4", ("method key='host'", "'hosts'")),
        ("task.depth=2", ("task.depth=2", "[0, 1]")),
        ("task.digits=12ab", ("task.digits='12ab'", "digits only")),
        ("task.name=passky", ("task.name='passky'", "'passkey'")),
        ("+task.num_token=4", ("task key='num_token'", "'num_tokens'")),
        ("model.dtype=float8", ("model.dtype='float8'", "bfloat16")),
        ("model.num_layers=2", ("model.num_layers=2", "dummy")),
        ("model.path=null", ("model.path is missing",)),
        ("parallel.timeout_s=-1", ("parallel.timeout_s=-1",)),
        ("parallel.shard_ranks=1", ("parallel.shard_ranks=1 needs model.shard_weights=true",)),
        ("parallel.shard_ranks=two", ("parallel.shard_ranks='two' must be an integer",)),
        ("seed=-1", ("seed=-1",)),
        ("+sead=1", ("config key='sead'", "'seed'")),
    ],
)
def test_bad_values_are_named(override: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as raised:
        settings(override)
    for part in parts:
        assert part in str(raised.value)


def test_hosts_must_divide_over_the_launched_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="multiple of the number of ranks"):
        settings("method.hosts=8")


def test_unknown_exp_does_not_compose() -> None:
    with pytest.raises(MissingConfigException):
        compose("infer", ["+exp=llama_12k"])


def test_exps_are_all_there() -> None:
    assert set(names("exp")) >= set(itertools.chain(PUBLISHED_LENGTHS, ["smollm2_8k"]))
