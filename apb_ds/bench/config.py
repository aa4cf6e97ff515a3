"""What a benchmark measures, validated before anything is loaded. No torch here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from apb_ds.config import APBConfig, check_bool, check_choice, check_integer

# What transformers computes alone, on one rank.
PLAIN_METHODS = ("dense", "dense_onednn")
# What the engine computes, and what it calls these methods.
ENGINE_METHODS = {"dense_engine": "dense", "apb": "apb", "star": "star", "ring": "ring", "ulysses": "ulysses"}
METHODS = (*PLAIN_METHODS, *ENGINE_METHODS)
ONE_RANK_METHODS = (*PLAIN_METHODS, "dense_engine")
METHODS_WITH_HOSTS = ("apb", "star")


@dataclass(frozen=True)
class BenchConfig:
    """What to measure: every method at every length; ``apb`` and ``star`` with every number of hosts, and whatever the
    engine computes with every kernel.

    Parameters
    ----------
    methods : list of str
        ``dense``: the plain transformers model with sdpa. ``dense_onednn``: the same with the linear layers that the
        engine uses on CPU. ``dense_engine``, ``ring``, ``ulysses``: the engine's exact methods. ``apb`` and ``star``.
        The three dense ones run on one rank. The first one is what the others are compared with.
    lengths : list of int, tokens
        Lengths of the document; by default the task's.
    hosts, kernels : list
        By default those under ``method``.
    settings : dict
        By method, fields of `APBConfig` that differ from those under ``method``.
    query_tokens, decode_tokens : int
        The query's length, and how many tokens are decoded after the first. With 0 of these a prefill is all.
    repeats, warmup : int
        Timed runs of each case, in turns, so that a drift of the machine meets all of them; and runs before that.
    breakdown : bool
        Whether to run each case once more under a profiler, for the time of its parts.
    emulate_ranks : int, optional
        Run each rank's share of a prefill over so many ranks in turn, in this process; nothing but a prefill then.
    link_gb_per_s, link_latency_us : float
        The link model of an emulation: 10**9 bytes per second that a rank sends, and microseconds that each collective
        takes besides.

    Raises
    ------
    ValueError
        For a value out of its range, naming the field, the value and what is allowed.
    """

    methods: tuple[str, ...] = ("dense", "apb")
    lengths: tuple[int, ...] = ()
    hosts: tuple[int, ...] = ()
    kernels: tuple[str, ...] = ()
    settings: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    query_tokens: int = 32
    decode_tokens: int = 16
    repeats: int = 5
    warmup: int = 1
    breakdown: bool = False
    emulate_ranks: int | None = None
    link_gb_per_s: float = 50.0
    link_latency_us: float = 20.0

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError(f"bench.methods is empty; use some of {', '.join(METHODS)}.")
        _check_list("bench.methods", self.methods, lambda name, method: check_choice(name, method, METHODS))
        _check_list("bench.lengths", self.lengths, lambda name, length: check_integer(name, length, 1))
        _check_list("bench.hosts", self.hosts, lambda name, hosts: check_integer(name, hosts, 1))
        _check_list("bench.kernels", self.kernels, _check_name)
        for name, minimum in (("query_tokens", 1), ("decode_tokens", 0), ("repeats", 1), ("warmup", 0)):
            check_integer(f"bench.{name}", getattr(self, name), minimum)
        check_bool("bench.breakdown", self.breakdown)
        if self.emulate_ranks is not None:
            check_integer("bench.emulate_ranks", self.emulate_ranks, 2)
        _check_number("bench.link_gb_per_s", self.link_gb_per_s, above_zero=True)
        _check_number("bench.link_latency_us", self.link_latency_us)
        for method, changes in self.settings.items():
            check_choice("bench.settings", method, ENGINE_METHODS)
            if not isinstance(changes, dict):
                raise ValueError(f"bench.settings.{method}={changes!r} must be a mapping of the method's settings.")
            for key in changes:
                check_choice(f"bench.settings.{method} key", key, APBConfig.__dataclass_fields__)

    @property
    def num_new(self) -> int:
        """Tokens that are generated: the first one, and those decoded; none where there is a prefill alone."""
        return self.decode_tokens + 1 if self.decode_tokens else 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BenchConfig:
        """Build from a mapping; null is the default, an unknown key a ValueError that names the nearest one.

        What takes a list takes a single value, too, as Hydra's sweeps give it.
        """
        given: dict[str, Any] = {}
        for key, value in values.items():
            check_choice("bench key", key, cls.__dataclass_fields__)
            if value is None:
                continue
            if key in ("methods", "lengths", "hosts", "kernels"):
                value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
            given[key] = value
        return cls(**given)


def _check_list(name: str, values: tuple[Any, ...], check: Callable[[str, Any], None]) -> None:
    for value in values:
        check(name, value)
    if len(set(values)) < len(values):
        raise ValueError(f"{name}={list(values)} names something twice; leave one out.")


def _check_name(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name}={value!r} must be names of kernels.")


def _check_number(name: str, value: Any, *, above_zero: bool = False) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < 0 or (above_zero and value == 0):
        raise ValueError(f"{name}={value!r} must be a number {'above' if above_zero else 'of at least'} 0.")
