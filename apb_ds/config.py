"""The options a user sets, validated once, before anything is loaded. No torch here."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Self, TypeVar

EXACT_METHODS = ("dense", "ring", "ulysses")
METHODS = ("apb", "star", *EXACT_METHODS)
SCHEDULES = ("zigzag", "natural")
MAX_HOSTS = 1_000_000
DEFAULT_COMPRESSOR = "window"
DEFAULT_COMPRESSION_RATIO = 8
MAX_DEFAULT_ANCHOR_LENGTH = 8192
ANCHOR_IS_BLOCK = "block"
HEADS_KEY = "retaining_heads"  # of a composed config's section method; not a field of APBConfig
# Names are checked here, without importing what they name. `register_compressor` adds others.
COMPRESSORS = ["heads_and_window", "keydiff", "knorm", "query", "random", "recent", "retaining_heads", "window"]
KERNELS = (
    "auto", "flash_attn3", "torch_cudnn", "flash_attn2", "torch_flash", "torch_efficient", "cpu_flash", "reference",
)  # fmt: skip
# Settings of every method: how things are computed, not what.
EXECUTION_DEFAULTS: dict[str, Any] = {"kernel": "auto", "cuda_graph": True, "fused": True, "mlp_tile": None}

Config = TypeVar("Config")


def from_mapping(cls: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """Build a config dataclass from a mapping, such as a section of the composed config.

    A null leaves its field at the default. An unknown key is a ValueError that names the nearest field and `where` the
    mapping comes from.
    """
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    for key in values:
        check_choice(f"{where} key", key, names)
    return cls(**{key: value for key, value in values.items() if value is not None})


def suggest(value: object, allowed: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the allowed name nearest to `value`, or an empty string."""
    near = difflib.get_close_matches(str(value), list(allowed), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def check_choice(field: str, value: object, allowed: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of the `allowed` names."""
    names = list(allowed)
    if value not in names:
        raise ValueError(f"{field}={value!r} is not known; use one of {', '.join(names)}.{suggest(value, names)}")


def is_number(value: object) -> bool:
    """Whether `value` is a finite number (true and false are not)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_integer(field: str, value: object, minimum: int) -> None:
    """Raise ValueError unless `value` is an integer of at least `minimum`; a bool is not an integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{field}={value!r} must be an integer of at least {minimum}.")


def check_bool(field: str, value: object) -> None:
    """Raise ValueError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{field}={value!r} must be true or false.")


@dataclass(frozen=True)
class MethodSettings:
    """What a method runs with: an `APBConfig` whose open fields have their defaults.

    Only defaults that depend on the document (`anchor_length`, `passing_length`, `hosts_per_round`) or on the device
    (`mlp_tile`) are still None here; `plan_request` and the engine choose those. An exact method has only these
    settings; `BlockSettings` adds those of ``apb`` and ``star``.
    """

    method: str
    kernel: str
    cuda_graph: bool
    fused: bool
    mlp_tile: int | None

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_choice("kernel", self.kernel, KERNELS)
        check_bool("cuda_graph", self.cuda_graph)
        check_bool("fused", self.fused)
        if self.mlp_tile is not None:
            check_integer("mlp_tile", self.mlp_tile, 1)


@dataclass(frozen=True)
class BlockSettings(MethodSettings):
    """What ``apb`` and ``star`` run with; fields as in `APBConfig`."""

    hosts: int
    anchor_length: int | str | None
    passing_length: int | None
    compression_ratio: float | None
    compressor: str
    query_in_anchor: bool
    query_position: int
    schedule: str
    hosts_per_round: int | None
    shard_anchor: bool
    seed: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("hosts", self.hosts, 1)
        if self.hosts > MAX_HOSTS:
            raise ValueError(f"hosts={self.hosts} must be at most {MAX_HOSTS}; a block needs at least one token.")
        check_choice("schedule", self.schedule, SCHEDULES)
        if self.hosts_per_round is not None:
            check_integer("hosts_per_round", self.hosts_per_round, 1)
        check_integer("query_position", self.query_position, 0)
        check_integer("seed", self.seed, 0)
        check_bool("query_in_anchor", self.query_in_anchor)
        check_bool("shard_anchor", self.shard_anchor)
        check_choice("compressor", self.compressor, COMPRESSORS)
        self._check_lengths()

    def _check_lengths(self) -> None:
        if isinstance(self.anchor_length, str):
            check_choice("anchor_length", self.anchor_length, [ANCHOR_IS_BLOCK])
        elif self.anchor_length is not None:
            check_integer("anchor_length", self.anchor_length, 0)
        if self.passing_length is not None:
            check_integer("passing_length", self.passing_length, 0)
        ratio = self.compression_ratio
        if ratio is None:
            return
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not math.isfinite(ratio) or ratio < 1:
            raise ValueError(f"compression_ratio={ratio!r} must be a number of at least 1.")
        if self.passing_length is not None:
            raise ValueError(
                f"passing_length={self.passing_length} and compression_ratio={ratio} both set how much is passed; "
                "give one of them."
            )


@dataclass(frozen=True)
class APBConfig:
    """Options of APB (arXiv 2502.12085) as a user gives them; ``None`` leaves a field at its default.

    Parameters
    ----------
    method : str
        ``apb``, or ``star`` (arXiv 2411.17116): APB with nothing passed, an anchor as long as a block and no query
        in the anchor, a preset whose three settings can still be changed. Or an exact method to compare with:
        ``dense`` (one rank), ``ring`` (arXiv 2310.01889, zigzag-balanced) or ``ulysses`` (arXiv 2309.14509, DeepSpeed's
        implementation). Exact methods take only `kernel`, `cuda_graph`, `fused` and `mlp_tile`.
    hosts : int
        Number of context blocks, a multiple of the number of ranks. Default 8.
    anchor_length : int or "block", tokens
        Anchor tokens, including the embedded query. 0 means no anchor, ``"block"`` the length of the first block.
        Default: a quarter of a block, at most 8192, but enough to hold the query.
    passing_length : int, tokens
        Tokens that the compressor keeps of each block, per layer and KV head. Excludes `compression_ratio`.
    compression_ratio : float
        Block length over passing length, at least 1. Default 8. Excludes `passing_length`.
    compressor : str
        Name in the registry of `apb_ds.compressors`, where your own is registered first. Default ``window``.
    query_in_anchor : bool
        Whether the anchor embeds the query. Default true (false for ``star``).
    query_position : int, tokens
        How many document tokens precede the query in the anchor. Default 1, the begin-of-sequence token.
    schedule : str
        Which rank serves which host in each round: ``zigzag`` (default) or ``natural``.
    hosts_per_round : int
        How many of its hosts a rank computes in one model forward. More hosts take more memory and fewer launches, and
        balance the ranks within each layer. The result is the same. Default: 1 on CPU; elsewhere as many as have
        `plan.FORWARD_TOKENS` tokens together, with several ranks at least 2.
    shard_anchor : bool
        Whether each rank computes its share of the anchor (default) or all of it. The result is the same.
    seed : int
        Seed of the ``random`` compressor. Default 0.
    kernel : str
        Attention kernel by name, or ``auto`` (default): the best one installed for device and dtype.
    cuda_graph : bool
        Whether decode steps, with their collectives, are recorded as CUDA graphs and replayed where possible. Default
        true.
    fused : bool
        Whether the model's norms, gated activations and rotations, and the merging of partial attention, are compiled
        with ``torch.compile`` on CUDA where possible. Default true.
    mlp_tile : int, tokens
        Tokens that the model's MLPs compute at a time; fewer save memory where blocks are long. Default: 256 on CPU,
        elsewhere a whole block.

    Raises
    ------
    ValueError
        For a value out of its range, naming the field, the value and what is allowed.
    """

    method: str | None = None
    hosts: int | None = None
    anchor_length: int | str | None = None
    passing_length: int | None = None
    compression_ratio: float | None = None
    compressor: str | None = None
    query_in_anchor: bool | None = None
    query_position: int | None = None
    schedule: str | None = None
    hosts_per_round: int | None = None
    shard_anchor: bool | None = None
    seed: int | None = None
    kernel: str | None = None
    cuda_graph: bool | None = None
    fused: bool | None = None
    mlp_tile: int | None = None

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Name the nearest field for an option that does not exist, where Python's own TypeError would not."""
        names = [field.name for field in fields(cls)]
        for name in options:
            if name not in names:
                raise TypeError(f"APBConfig has no option {name!r}.{suggest(name, names)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.settings  # noqa: B018 (raises for values out of range)

    @cached_property
    def settings(self) -> MethodSettings:
        """These options with their defaults filled in."""
        if self.is_exact_method:
            return self._exact_settings()
        star = self.method == "star"
        defaults = {
            "method": "apb",
            "hosts": 8,
            "compressor": DEFAULT_COMPRESSOR,
            "query_in_anchor": not star,
            "query_position": 1,
            "schedule": "zigzag",
            "shard_anchor": True,
            "seed": 0,
            **EXECUTION_DEFAULTS,
        }
        if star:
            defaults["anchor_length"] = ANCHOR_IS_BLOCK
            defaults["passing_length"] = 0 if self.compression_ratio is None else None
        return BlockSettings(**self._with(defaults))

    @property
    def is_exact_method(self) -> bool:
        """Whether the method computes exact attention, whatever the lengths."""
        return self.method in EXACT_METHODS

    def resolved(self) -> dict[str, Any]:
        """Return `settings` by this class's field names, for records; None where the method has no such setting."""
        return {field.name: getattr(self.settings, field.name, None) for field in fields(self)}

    def _exact_settings(self) -> MethodSettings:
        names = ("method", *EXECUTION_DEFAULTS)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in names and value is not None:
                raise ValueError(
                    f"{field.name}={value!r} is a setting of apb and star; method={self.method} is exact and takes "
                    f"only {', '.join(EXECUTION_DEFAULTS)}. Leave it out."
                )
        given = self._with(EXECUTION_DEFAULTS)
        return MethodSettings(**{name: given[name] for name in names})

    def _with(self, defaults: dict[str, Any]) -> dict[str, Any]:
        """Return all fields, those that are None from `defaults`."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: defaults.get(name) if value is None else value for name, value in given.items()}

    @classmethod
    def of(cls, config: object) -> APBConfig:
        """Return a config, a mapping of its fields, or None for all defaults, as a config.

        Raises
        ------
        ValueError
            For anything else, and for fields that do not exist.
        """
        if isinstance(config, APBConfig):
            return config
        if config is not None and not isinstance(config, Mapping):
            raise ValueError(f"config={config!r} must be an APBConfig, or a mapping of its fields.")
        return cls.from_dict(dict(config or {}), "config")

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "method") -> APBConfig:
        """Build from a mapping; an unknown key is a ValueError that names the nearest field."""
        return from_mapping(cls, values, where)


def config_and_heads(config: object, heads: Any = None) -> tuple[APBConfig, Any]:
    """Return `APBConfig.of` what was given and the retaining heads, which a composed ``method`` section names, too.

    Parameters
    ----------
    heads : given otherwise; they come before the section's
    """
    if isinstance(config, Mapping) and HEADS_KEY in config:
        heads = config[HEADS_KEY] if heads is None else heads
        config = {key: value for key, value in config.items() if key != HEADS_KEY}
    return APBConfig.of(config), heads


def name_keys(message: str, *, of_method: bool = False) -> str:
    """Return a message with the method's settings as they are called in configs, such as ``method.hosts=0``.

    Whoever reads configs calls this; in Python, `APBConfig` has them without the section.

    Parameters
    ----------
    of_method : whether ``seed`` is the method's here; configs also have a top-level ``seed``
    """
    others = ("method",) if of_method else ("method", "seed")
    names = [field.name for field in fields(APBConfig) if field.name not in others]
    # method=dense is a group's choice, and stands as it is; method='dens' is the field's value.
    return re.sub(rf"(?<![\w.'/-])(?=(?:{'|'.join(names)})=|method=')", "method.", message)
