"""What `APBConfig` accepts, fills in and refuses."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from apb_ds.config import APBConfig, check_choice, from_mapping, name_keys, suggest

DEFAULTS = {
    "method": "apb",
    "hosts": 8,
    "anchor_length": None,
    "passing_length": None,
    "compression_ratio": None,
    "compressor": "window",
    "query_in_anchor": True,
    "query_position": 1,
    "schedule": "zigzag",
    "hosts_per_round": None,
    "shard_anchor": True,
    "seed": 0,
    "kernel": "auto",
    "cuda_graph": True,
    "fused": True,
    "mlp_tile": None,
}

REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    # given, what the message must hold: field, value, what is allowed, the nearest name
    ({"method": "abp"}, ["method", "'abp'", "apb, star", "Did you mean 'apb'?"]),
    ({"method": "ringg"}, ["method", "'ringg'", "apb, star"]),
    ({"hosts": 0}, ["hosts", "0", "at least 1"]),
    ({"hosts": -8}, ["hosts", "-8", "at least 1"]),
    ({"hosts": 2.0}, ["hosts", "2.0", "integer"]),
    ({"hosts": "8"}, ["hosts", "'8'", "integer"]),
    ({"hosts": True}, ["hosts", "True", "integer"]),
    ({"anchor_length": -1}, ["anchor_length", "-1", "at least 0"]),
    ({"anchor_length": 0.5}, ["anchor_length", "0.5", "integer"]),
    ({"anchor_length": False}, ["anchor_length", "False", "integer"]),
    ({"anchor_length": "blok"}, ["anchor_length", "'blok'", "block", "Did you mean 'block'?"]),
    ({"passing_length": -1}, ["passing_length", "-1", "at least 0"]),
    ({"passing_length": "block"}, ["passing_length", "'block'", "integer"]),
    ({"passing_length": 1.5}, ["passing_length", "1.5", "integer"]),
    ({"compression_ratio": 0.99}, ["compression_ratio", "0.99", "at least 1"]),
    ({"compression_ratio": 0}, ["compression_ratio", "0", "at least 1"]),
    ({"compression_ratio": "8"}, ["compression_ratio", "'8'", "number"]),
    ({"compression_ratio": True}, ["compression_ratio", "True", "number"]),
    ({"compression_ratio": float("nan")}, ["compression_ratio", "nan", "number"]),
    ({"compression_ratio": float("inf")}, ["compression_ratio", "inf", "number"]),
    ({"passing_length": 4, "compression_ratio": 8}, ["passing_length=4", "compression_ratio=8", "one of them"]),
    ({"passing_length": 0, "compression_ratio": 8}, ["passing_length=0", "compression_ratio=8", "one of them"]),
    ({"compressor": 3}, ["compressor", "3", "window"]),
    ({"compressor": "windo"}, ["compressor", "'windo'", "knorm", "Did you mean 'window'?"]),
    ({"kernel": 3}, ["kernel", "3", "auto"]),
    ({"kernel": "cpu_flsh"}, ["kernel", "'cpu_flsh'", "auto", "Did you mean 'cpu_flash'?"]),
    ({"method": "dense", "kernel": "cpu_flsh"}, ["kernel", "Did you mean 'cpu_flash'?"]),
    ({"hosts": 10**9}, ["hosts", "1000000000", "at most 1000000"]),
    ({"cuda_graph": 1}, ["cuda_graph", "1", "true or false"]),
    ({"cuda_graph": "ranks"}, ["cuda_graph", "'ranks'", "true or false"]),
    ({"mlp_tile": 0}, ["mlp_tile", "0", "at least 1"]),
    ({"method": "ring", "mlp_tile": True}, ["mlp_tile", "True", "at least 1"]),
    ({"fused": "yes"}, ["fused", "yes", "true or false"]),
    ({"method": "dense", "cuda_graph": "no"}, ["cuda_graph", "no", "true or false"]),
    ({"query_in_anchor": 1}, ["query_in_anchor", "1", "true or false"]),
    ({"query_in_anchor": "yes"}, ["query_in_anchor", "'yes'", "true or false"]),
    ({"shard_anchor": 0}, ["shard_anchor", "0", "true or false"]),
    ({"query_position": -1}, ["query_position", "-1", "at least 0"]),
    ({"query_position": 1.0}, ["query_position", "1.0", "integer"]),
    ({"schedule": "zigzga"}, ["schedule", "'zigzga'", "zigzag, natural", "Did you mean 'zigzag'?"]),
    ({"hosts_per_round": 0}, ["hosts_per_round", "0", "at least 1"]),
    ({"hosts_per_round": "all"}, ["hosts_per_round", "'all'", "integer"]),
    ({"seed": -1}, ["seed", "-1", "at least 0"]),
    ({"seed": "0"}, ["seed", "'0'", "integer"]),
]


@pytest.mark.parametrize("given, named", REFUSED, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_errors_name_field_value_and_what_is_allowed(given: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        APBConfig(**given)
    assert all(words in str(caught.value) for words in named), str(caught.value)


def test_every_field_is_refused_somewhere() -> None:
    refused = {name for given, _ in REFUSED for name in given}
    assert refused == {field.name for field in dataclasses.fields(APBConfig)}


@pytest.mark.parametrize("given", [{}, dict.fromkeys(DEFAULTS)], ids=["nothing given", "all None"])
def test_none_means_the_default(given: dict[str, Any]) -> None:
    assert APBConfig(**given).resolved() == DEFAULTS


@pytest.mark.parametrize(
    "given",
    [
        {"hosts": 1},
        {"anchor_length": 0},
        {"anchor_length": "block"},
        {"passing_length": 0},
        {"compression_ratio": 1},
        {"compression_ratio": 2.5},
        {"query_in_anchor": False},
        {"query_position": 0},
        {"schedule": "natural"},
        {"shard_anchor": False},
        {"seed": 7},
        {"hosts_per_round": 2},
    ],
    ids=str,
)
def test_a_value_given_is_kept(given: dict[str, Any]) -> None:
    assert APBConfig(**given).resolved() == {**DEFAULTS, **given}


STAR = {**DEFAULTS, "method": "star", "anchor_length": "block", "passing_length": 0, "query_in_anchor": False}


@pytest.mark.parametrize(
    "given, changed",
    [
        ({}, {}),
        ({"anchor_length": 0}, {"anchor_length": 0}),
        ({"anchor_length": 12}, {"anchor_length": 12}),
        ({"passing_length": 3}, {"passing_length": 3}),
        ({"compression_ratio": 4}, {"compression_ratio": 4, "passing_length": None}),
        ({"query_in_anchor": True}, {"query_in_anchor": True}),
    ],
    ids=str,
)
def test_star_is_a_preset_and_each_part_of_it_can_be_set(given: dict[str, Any], changed: dict[str, Any]) -> None:
    assert APBConfig(method="star", **given).resolved() == {**STAR, **changed}


def test_settings_are_frozen_and_compare_by_value() -> None:
    config = APBConfig(hosts=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hosts = 8  # type: ignore[misc]
    assert config == APBConfig(hosts=4) and hash(config) == hash(APBConfig(hosts=4))
    assert config.settings == APBConfig(hosts=4, seed=0).settings, "what is left out has its default"
    assert dataclasses.replace(config, hosts=2) == APBConfig(hosts=2)


def test_star_survives_a_replace() -> None:
    star = APBConfig(method="star")
    assert dataclasses.replace(star, query_position=24) == APBConfig(method="star", query_position=24)


def test_from_dict() -> None:
    assert APBConfig.from_dict({"hosts": 4, "seed": None}) == APBConfig(hosts=4)
    with pytest.raises(ValueError) as caught:
        APBConfig.from_dict({"hosts": 4, "anchor_lenght": 3})
    message = str(caught.value)
    assert all(words in message for words in ("method key", "'anchor_lenght'", "Did you mean 'anchor_length'?", "seed"))
    with pytest.raises(ValueError, match=r"bench\.apb key"):
        APBConfig.from_dict({"host": 4}, where="bench.apb")


def test_from_mapping_keeps_defaults_and_names_the_nearest_field() -> None:
    @dataclass
    class Section:
        size: int = 3
        colour: str = "red"

    assert from_mapping(Section, {"colour": "blue", "size": None}, "section") == Section(3, "blue")
    with pytest.raises(ValueError, match=r"section key='color'.*Did you mean 'colour'\?"):
        from_mapping(Section, {"color": "blue"}, "section")


def test_a_name_far_from_all_others_gets_no_suggestion() -> None:
    assert suggest("qqq", ["window", "random"]) == ""
    with pytest.raises(ValueError, match=r"use one of window, random\.$"):
        check_choice("compressor", "qqq", ["window", "random"])


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ("hosts=0 must be", "method.hosts=0 must be"),
        ("method.hosts=0, use kernel=auto", "method.hosts=0, use method.kernel=auto"),
        ("method='abp'; method=dense", "method.method='abp'; method=dense"),
        ("seed=-1, task.seed=-1", "seed=-1, task.seed=-1"),
        ("'hosts=3', /x/hosts=3, my_hosts=3, hosts", "'hosts=3', /x/hosts=3, my_hosts=3, hosts"),
    ],
)
def test_settings_are_named_as_in_configs(message: str, named: str) -> None:
    assert name_keys(message) == named


def test_settings_and_plans_need_no_torch() -> None:
    code = (
        "import sys, apb_ds, apb_ds.config, apb_ds.plan\n"
        "apb_ds.plan_request(apb_ds.APBConfig(), 1000, 5)\n"
        "print(sorted({'torch', 'transformers', 'deepspeed', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")
