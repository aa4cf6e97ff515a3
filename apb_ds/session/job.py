"""A job: what the configs ask for, before and after it is validated."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from apb_ds.attention import APBAttention
from apb_ds.config import APBConfig, check_choice, check_integer
from apb_ds.loading import ModelConfig
from apb_ds.parallel.groups import DEFAULT_TIMEOUT_S, launched_world_size
from apb_ds.plan import check_ranks
from apb_ds.tasks import TaskConfig, build_task_config

SECTIONS = ("model", "method", "task", "parallel", "seed", "debug")
PARALLEL_KEYS = ("timeout_s",)


@dataclass(frozen=True)
class Job:
    """One job as it was asked for.

    Attributes
    ----------
    values : the composed config, as plain dicts; not validated yet
    run_dir : where the first rank writes the record, or None for nowhere
    overrides : what the command line changed, by config path
    in_sweep : whether it is one of several jobs
    """

    values: dict[str, Any]
    run_dir: Path | None = None
    overrides: dict[str, str] = field(default_factory=dict)
    in_sweep: bool = False

    @property
    def debug(self) -> bool:
        return bool(self.values.get("debug"))


@dataclass(frozen=True)
class Settings:
    """A job's settings, validated.

    Attributes
    ----------
    position_from_template : whether ``method.query_position`` was left to the chat template
    """

    model: ModelConfig
    method: APBConfig
    task: TaskConfig
    timeout_s: float
    seed: int
    position_from_template: bool

    def method_for(self, query_position: int) -> APBConfig:
        """Return the method's settings with the query position of a sample, unless the user gave one."""
        if not self.position_from_template or self.method.is_exact_method:
            return self.method
        return replace(self.method, query_position=query_position)


def read_settings(values: dict[str, Any]) -> Settings:
    """Validate a composed config, as far as that needs no model. The result is the same on every rank.

    Raises
    ------
    ValueError, RuntimeError
        For an unknown key or name, a value out of its range, hosts that do not divide over the ranks, or a kernel
        that is not installed.
    """
    for key in values:
        check_choice("config key", key, SECTIONS)
    method_values = dict(values.get("method") or {})
    method = APBConfig.from_dict(method_values)
    check_ranks(method, launched_world_size())
    APBAttention(method)  # refuses unknown compressors and kernels
    parallel = dict(values.get("parallel") or {})
    for key in parallel:
        check_choice("parallel key", key, PARALLEL_KEYS)
    timeout_s = parallel.get("timeout_s") or DEFAULT_TIMEOUT_S
    check_integer("parallel.timeout_s", timeout_s, 1)
    seed = values.get("seed") or 0
    check_integer("seed", seed, 0)
    return Settings(
        model=ModelConfig.from_dict(dict(values.get("model") or {})),
        method=method,
        task=build_task_config(dict(values.get("task") or {})),
        timeout_s=timeout_s,
        seed=seed,
        position_from_template=method_values.get("query_position") is None,
    )
