"""A benchmark's settings and its grid of cases."""

from __future__ import annotations

from typing import Any

import pytest

from apb_ds.bench import BenchConfig
from apb_ds.bench.cases import Case, make_cases
from apb_ds.bench.config import METHODS
from apb_ds.config import APBConfig, from_mapping
from apb_ds.session import read_settings
from tests.bench_cases import CONFIGS, composed

EXPS = sorted(
    file.stem for file in (CONFIGS / "exp").glob("*.yaml") if file.stem not in ("smollm2_ruler", "smollm2_heads")
)
LENGTHS = (1000,)


def bench_config(values: dict[str, Any]) -> BenchConfig:
    return from_mapping(BenchConfig, values, "bench")


def cases(method: APBConfig | None = None, world_size: int = 1, **given: Any) -> list[Case]:
    return make_cases(bench_config(given), method or APBConfig(), LENGTHS, world_size)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        *((f"+exp={exp}", "model.load_format=dummy") for exp in EXPS),
        *((f"method={name}",) for name in ("apb", "star", "dense", "ring", "ulysses")),
        *((f"model={name}",) for name in ("smollm2", "smollm2_ruler", "llama31_8b", "gemma3_27b")),
    ],
    ids=str,
)
def test_every_config_composes(overrides: tuple[str, ...]) -> None:
    values = composed(*overrides)
    bench = bench_config(values.pop("bench"))
    settings = read_settings(values)
    length = values["task"]["num_tokens"]
    grid = make_cases(bench, settings.method, (length,), 1)
    assert [case.method for case in grid] == ["dense", "apb"]
    if settings.method.method == "apb":
        assert grid[1].config == settings.method


def test_the_config_lists_every_setting_with_its_default() -> None:
    bench = composed()["bench"]
    assert set(bench) == set(BenchConfig.__dataclass_fields__)
    assert bench_config(bench) == BenchConfig()


def test_settings_by_method_on_the_command_line() -> None:
    bench = bench_config(composed("+bench.settings.star.shard_anchor=false")["bench"])
    assert bench.settings == {"star": {"shard_anchor": False}}


def test_a_single_value_is_a_list_of_one() -> None:
    bench = bench_config({"methods": "apb", "lengths": 100, "hosts": 4, "kernels": "reference", "sequences": 8})
    assert bench.sequences == (8,)
    assert (bench.methods, bench.lengths, bench.hosts, bench.kernels) == (("apb",), (100,), (4,), ("reference",))


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"methods": []}, ("bench.methods is empty", "dense_engine")),
        ({"methods": ["abp"]}, ("bench.methods='abp'", "'apb'")),
        ({"methods": ["apb", "apb"]}, ("bench.methods=", "duplicate")),
        ({"lengths": [0]}, ("bench.lengths=0", "at least 1")),
        ({"hosts": ["many"]}, ("bench.hosts='many'",)),
        ({"kernels": ["cpu_flsh"]}, ("bench.kernels='cpu_flsh'", "cpu_flash")),
        ({"repeats": 0}, ("bench.repeats=0",)),
        ({"warmup": -1}, ("bench.warmup=-1",)),
        ({"query_tokens": 0}, ("bench.query_tokens=0",)),
        ({"decode_tokens": -1}, ("bench.decode_tokens=-1",)),
        ({"breakdown": "yes"}, ("bench.breakdown='yes'",)),
        ({"sequences": [8, 0]}, ("bench.sequences=0", "at least 1")),
        ({"sequences": [8, 8]}, ("bench.sequences=", "duplicate")),
        ({"sequences": [8], "emulate_ranks": 2}, ("bench.sequences=[8]", "bench.emulate_ranks")),
        ({"sequences": [8], "decode_tokens": 0}, ("bench.sequences=[8]", "bench.decode_tokens")),
        ({"sequences": [8], "methods": ["dense"]}, ("bench.sequences=[8]", "bench.methods", "apb")),
        ({"sequences": [8], "interleave": 2}, ("bench.interleave=2",)),
        ({"interleave": True}, ("bench.interleave=true", "bench.sequences")),
        ({"emulate_ranks": 1}, ("bench.emulate_ranks=1", "at least 2")),
        ({"link_gb_per_s": 0}, ("bench.link_gb_per_s=0", "above 0")),
        ({"link_latency_us": -1}, ("bench.link_latency_us=-1", "at least 0")),
        ({"settings": {"dense": {}}}, ("bench.settings='dense'",)),
        ({"settings": {"star": 3}}, ("bench.settings.star=3",)),
        (
            {"settings": {"star": {"shard_anchors": False}}},
            ("bench.settings.star key='shard_anchors'", "'shard_anchor'"),
        ),
        ({"repeat": 3}, ("bench key='repeat'", "'repeats'")),
    ],
)
def test_bad_values_are_named(given: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as raised:
        bench_config(given)
    for part in parts:
        assert part in str(raised.value)


def test_the_grid() -> None:
    grid = make_cases(
        bench_config(
            {"methods": list(METHODS), "hosts": [4, 8], "kernels": ["reference", "cpu_flash"], "lengths": [500, 1000]}
        ),
        APBConfig(),
        (500, 1000),
        1,
    )
    # The plain model twice; of the engine three exact methods with two kernels, two others with hosts, too.
    assert len(grid) == 2 * (2 + 3 * 2 + 2 * 2 * 2)
    assert len(set(grid)) == len(grid)
    of_apb = [case for case in grid if case.method == "apb" and case.length == 500]
    assert [(case.hosts, case.config.settings.kernel) for case in of_apb if case.config] == [
        (4, "reference"),
        (4, "cpu_flash"),
        (8, "reference"),
        (8, "cpu_flash"),
    ]


def test_names_tell_cases_apart() -> None:
    grid = cases(methods=["dense", "apb", "ring"], hosts=[4, 8], kernels=["auto", "reference"], emulate_ranks=4)
    names = [case.name for case in grid]
    assert len(set(names)) == len(names)
    assert names[0] == "dense" and names[1] == "apb, 4 hosts, 4 emulated ranks"
    assert names[-1] == "ring, reference, 4 emulated ranks"


def test_other_methods_take_over_how_work_is_shared() -> None:
    method = APBConfig(hosts=4, anchor_length=100, passing_length=20, shard_anchor=False, schedule="natural")
    apb, star, ring = (case.config for case in cases(method, methods=["apb", "star", "ring"]))
    assert apb == method
    assert star == APBConfig(method="star", hosts=4, shard_anchor=False, schedule="natural")
    assert ring == APBConfig(method="ring")


def test_other_methods_take_over_execution_settings() -> None:
    """Fused layers or recorded steps on one side alone would make a comparison unfair."""
    grid = cases(
        APBConfig(fused=False, cuda_graph=False, kernel="reference"), methods=["apb", "star", "dense_engine", "ring"]
    )
    configs = [case.config for case in grid if case.config is not None]
    assert len(configs) == len(grid)
    assert {(s.fused, s.cuda_graph, s.kernel) for s in (config.settings for config in configs)} == {
        (False, False, "reference")
    }


def test_settings_by_method() -> None:
    changes = {"star": {"shard_anchor": False}, "apb": {"compressor": "recent"}}
    apb, star = (case.config for case in cases(methods=["apb", "star"], settings=changes))
    assert apb == APBConfig(compressor="recent")
    assert star == APBConfig(method="star", shard_anchor=False)


def test_hosts_given_by_method_are_kept() -> None:
    found = cases(methods=["star", "apb"], hosts=[4, 8], settings={"star": {"hosts": 2}})
    assert [(case.method, case.hosts) for case in found] == [("star", 2), ("apb", 4), ("apb", 8)]


def test_an_exact_method_passes_on_only_execution_settings() -> None:
    (apb,) = (case.config for case in cases(APBConfig(method="ring", kernel="reference"), methods=["apb"]))
    assert apb is not None and apb.settings == APBConfig(kernel="reference").settings


@pytest.mark.parametrize("method", ["dense", "dense_onednn", "dense_engine"])
def test_dense_needs_one_rank(method: str) -> None:
    with pytest.raises(ValueError, match=f"bench.methods: {method} runs on one rank, and there are 2"):
        cases(world_size=2, methods=[method])
    (case,) = cases(methods=[method], emulate_ranks=8)
    assert (case.ranks, case.emulated) == (1, False)


def test_impossible_emulations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bench\.emulate_ranks=4 runs all ranks in one process, and there are 2"):
        cases(world_size=2, methods=["ring"], emulate_ranks=4)
    with pytest.raises(ValueError, match=r"apb, 1000 tokens, ranks: 3: hosts=8 must be a multiple"):
        cases(methods=["apb"], emulate_ranks=3)


def test_a_kernel_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apb_ds.ops.kernels.FlashAttn2Kernel.is_installed", classmethod(lambda cls: False))
    with pytest.raises(ValueError, match=r"flash_attn2.* not installed"):
        cases(methods=["apb"], kernels=["flash_attn2"])
