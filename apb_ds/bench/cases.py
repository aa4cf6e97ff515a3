"""The grid of a benchmark: one case for each method, length, number of hosts and kernel."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

from apb_ds.attention import check_available
from apb_ds.bench.config import (
    ENGINE_METHODS,
    METHODS_WITH_HOSTS,
    ONE_RANK_METHODS,
    PLAIN_METHODS,
    BenchConfig,
)
from apb_ds.config import EXECUTION_DEFAULTS, APBConfig, from_mapping
from apb_ds.plan import plan_request

# What other methods take over from the one under ``method``: how work is shared, not how much there is.
SHARED_SETTINGS = ("hosts", "schedule", "hosts_per_round", "shard_anchor", "query_position", *EXECUTION_DEFAULTS)


@dataclass(frozen=True)
class Case:
    """One cell of the grid to measure.

    Attributes
    ----------
    method : a name of `bench.methods`
    length : tokens of the document
    config : the engine's settings, None for the plain model
    ranks : number of ranks that share the document
    emulated : whether one process runs them in turn
    """

    method: str
    length: int
    config: APBConfig | None
    ranks: int
    emulated: bool = False

    @property
    def hosts(self) -> int | None:
        return None if self.config is None else self.config.resolved()["hosts"]

    @property
    def name(self) -> str:
        """What is measured, in a few words."""
        parts = [self.method]
        if self.hosts is not None:
            parts.append(f"{self.hosts} hosts")
        if self.config is not None and self.config.settings.kernel != "auto":
            parts.append(self.config.settings.kernel)
        if self.emulated:
            parts.append(f"{self.ranks} emulated ranks")
        return ", ".join(parts)


def make_cases(
    bench: BenchConfig, method: APBConfig, lengths: tuple[int, ...], world_size: int, *, shards: bool = False
) -> list[Case]:
    """Return the grid, by length, method, hosts and kernel.

    Parameters
    ----------
    method : the settings under ``method``
    world_size : number of real ranks; an emulation needs a single one
    shards : whether weights are sharded over the ranks

    Raises
    ------
    ValueError
        For methods that do not run on so many ranks or cannot be emulated, and settings that do not fit a length.
    """
    if bench.emulate_ranks is not None and world_size > 1:
        raise ValueError(
            f"bench.emulate_ranks={bench.emulate_ranks} runs all ranks in one process, and there are {world_size}; "
            "run without a launcher, or leave it out."
        )
    for name in ONE_RANK_METHODS:
        if name in bench.methods and shards and (name in PLAIN_METHODS or bench.emulate_ranks is not None):
            raise ValueError(
                f"bench.methods: {name} needs whole weights, and model.shard_weights=true; leave one of them out."
            )
        if name in bench.methods and world_size > 1:
            raise ValueError(
                f"bench.methods: {name} runs on one rank, and there are {world_size}; measure it without a launcher, "
                "or use apb, star, ring or ulysses."
            )
    cases = []
    for length, name in itertools.product(lengths, bench.methods):
        emulated = bench.emulate_ranks is not None and name not in ONE_RANK_METHODS
        ranks = bench.emulate_ranks if emulated and bench.emulate_ranks else world_size
        for config in _configs(bench, name, method):
            if config is not None:
                _check(config, bench, name, length, ranks)
            cases.append(Case(name, length, config, ranks, emulated))
    return cases


def _configs(bench: BenchConfig, name: str, method: APBConfig) -> list[APBConfig | None]:
    if name in PLAIN_METHODS:
        return [None]
    own = bench.settings.get(name, {})
    config = _settings(name, method, own)
    takes_hosts = name in METHODS_WITH_HOSTS and "hosts" not in own
    hosts = bench.hosts if takes_hosts and bench.hosts else (config.hosts,)
    kernels = bench.kernels or (config.kernel,)
    return [replace(config, hosts=count, kernel=kernel) for count, kernel in itertools.product(hosts, kernels)]


def _settings(name: str, method: APBConfig, changes: dict[str, Any]) -> APBConfig:
    """Return a method's settings: those under ``method`` if that is the method, else those the two share."""
    wanted = ENGINE_METHODS[name]
    if method.settings.method == wanted:
        return replace(method, **changes)
    shared = tuple(EXECUTION_DEFAULTS) if name not in METHODS_WITH_HOSTS or method.is_exact_method else SHARED_SETTINGS
    values = {"method": wanted, **{key: getattr(method, key) for key in shared}, **changes}
    return from_mapping(APBConfig, values, f"bench.settings.{name}")


def _check(config: APBConfig, bench: BenchConfig, name: str, length: int, ranks: int) -> None:
    try:
        check_available(config)
        plan_request(config, length, bench.query_tokens, ranks)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"bench: {name}, {length} tokens, ranks: {ranks}: {error}") from error
