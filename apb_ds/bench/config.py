"""What a benchmark measures, validated before anything is loaded. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from apb_ds.config import KERNELS, APBConfig, check_bool, check_choice, check_integer, is_number

# Plain transformers, on one rank.
PLAIN_METHODS = ("dense", "dense_onednn")
# The engine's methods, and their names in `APBConfig`.
ENGINE_METHODS = {"dense_engine": "dense", "apb": "apb", "star": "star", "ring": "ring", "ulysses": "ulysses"}
METHODS = (*PLAIN_METHODS, *ENGINE_METHODS)
ONE_RANK_METHODS = (*PLAIN_METHODS, "dense_engine")
METHODS_WITH_HOSTS = ("apb", "star")
# Of each sequence that runs during a prefill: enough for one of a minute; a longer one outlasts its sequences. With a
# query of 32 tokens they fit the smallest slot, whose recorded step is then there.
INTERLEAVED_TOKENS = 224


@dataclass(frozen=True)
class BenchConfig:
    """The grid to measure: every method at every length, ``apb`` and ``star`` with every number of hosts, and each of
    the engine's methods with every kernel.

    A list may also be given as a single value, as Hydra's sweeps do.

    Parameters
    ----------
    methods : list of str
        ``dense``: plain transformers with sdpa. ``dense_onednn``: the same with the linear layers that the engine uses
        on CPU. ``dense_engine``, ``ring``, ``ulysses``: the engine's exact methods. ``apb`` and ``star``. The three
        dense ones run on one rank. Speedups are relative to the first.
    lengths : list of int, tokens
        Document lengths. Default: the task's.
    hosts, kernels : list
        Default: those under ``method``.
    settings : dict
        For each method, the fields of `APBConfig` that differ from those under ``method``.
    query_tokens, decode_tokens : int
        Length of the query, and tokens decoded after the first. 0 `decode_tokens` measures the prefill alone.
    repeats, warmup : int
        Timed runs of each case, taken in turns so that drift affects all cases alike; and untimed runs before them.
    sequences : list of int
        For each number, answer so many queries about a document one after the other and together; see
        `apb_ds.bench.sequences`. For the engine's methods, with `decode_tokens`.
    interleave : bool
        Whether to prefill another document while as many queries as the most of `sequences` are answered; see
        `apb_ds.bench.interleaving`.
    breakdown : bool
        Whether to run each case once more under a profiler, for the time of its parts.
    emulate_ranks : int, optional
        Run the prefill share of each of so many ranks in turn, in this process. Measures the prefill alone.
    link_gb_per_s, link_latency_us : float
        Link model of an emulation: 10**9 bytes per second sent by a rank, and microseconds added by each collective.

    Raises
    ------
    ValueError
        For a value out of range, naming the field, the value and what is allowed.
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
    sequences: tuple[int, ...] = ()
    interleave: bool = False
    breakdown: bool = False
    emulate_ranks: int | None = None
    link_gb_per_s: float = 50.0
    link_latency_us: float = 20.0

    def __post_init__(self) -> None:
        for name in ("methods", "lengths", "hosts", "kernels", "sequences"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, (list, tuple)) else (value,))
        if not self.methods:
            raise ValueError(f"bench.methods is empty; use some of {', '.join(METHODS)}.")
        _check_list("bench.methods", self.methods, lambda name, method: check_choice(name, method, METHODS))
        _check_list("bench.lengths", self.lengths, lambda name, length: check_integer(name, length, 1))
        _check_list("bench.hosts", self.hosts, lambda name, hosts: check_integer(name, hosts, 1))
        _check_list("bench.kernels", self.kernels, lambda name, kernel: check_choice(name, kernel, KERNELS))
        for name, minimum in (("query_tokens", 1), ("decode_tokens", 0), ("repeats", 1), ("warmup", 0)):
            check_integer(f"bench.{name}", getattr(self, name), minimum)
        _check_list("bench.sequences", self.sequences, lambda name, number: check_integer(name, number, 1))
        check_bool("bench.interleave", self.interleave)
        check_bool("bench.breakdown", self.breakdown)
        if self.emulate_ranks is not None:
            check_integer("bench.emulate_ranks", self.emulate_ranks, 2)
        self._check_sequences()
        _check_number("bench.link_gb_per_s", self.link_gb_per_s, above_zero=True)
        _check_number("bench.link_latency_us", self.link_latency_us)
        for method, changes in self.settings.items():
            check_choice("bench.settings", method, ENGINE_METHODS)
            if not isinstance(changes, dict):
                raise ValueError(f"bench.settings.{method}={changes!r} must be a mapping of the method's settings.")
            for key in changes:
                check_choice(f"bench.settings.{method} key", key, APBConfig.__dataclass_fields__)

    def _check_sequences(self) -> None:
        if self.interleave and not self.sequences:
            raise ValueError("bench.interleave=true needs bench.sequences, whose largest number it runs; such as [8].")
        if not self.sequences:
            return
        asked = f"bench.sequences={list(self.sequences)}"
        if self.emulate_ranks is not None:
            raise ValueError(
                f"{asked} decodes, and bench.emulate_ranks emulates prefills alone; leave one of them out."
            )
        if not self.decode_tokens:
            raise ValueError(f"{asked} needs bench.decode_tokens of at least 1.")
        if set(self.methods) <= set(PLAIN_METHODS):
            raise ValueError(f"{asked} needs a method of the engine in bench.methods: {', '.join(ENGINE_METHODS)}.")

    @property
    def num_new_tokens(self) -> int:
        """Tokens to generate: the first one and those decoded; 0 if the prefill alone is measured."""
        return self.decode_tokens + 1 if self.decode_tokens else 0

    def num_positions(self, length: int) -> int:
        """Return the positions of a document of `length` tokens, a query and the longest answer to it."""
        longest = INTERLEAVED_TOKENS if self.interleave else 0
        return length + self.query_tokens + max(self.num_new_tokens, longest)


def _check_list(name: str, values: tuple[Any, ...], check: Callable[[str, Any], None]) -> None:
    for value in values:
        check(name, value)
    if len(set(values)) < len(values):
        raise ValueError(f"{name}={list(values)} has a duplicate; remove it.")


def _check_number(name: str, value: Any, *, above_zero: bool = False) -> None:
    if not is_number(value) or value < 0 or (above_zero and value == 0):
        raise ValueError(f"{name}={value!r} must be a number {'above' if above_zero else 'of at least'} 0.")
