"""A job: what the configs ask for, before and after validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from apb_ds.attention import check_available
from apb_ds.compressors.base import names_with_heads, needs_heads
from apb_ds.config import HEADS_KEY, APBConfig, check_bool, check_choice, check_integer, from_mapping, name_keys
from apb_ds.loading import ModelConfig
from apb_ds.parallel.groups import DEFAULT_TIMEOUT_S
from apb_ds.parallel.launcher import launched_world_size
from apb_ds.parallel.pipeline import check_stages
from apb_ds.plan import check_ranks
from apb_ds.tasks import TaskConfig, build_task_config
from apb_ds.tasks.checks import check_optional_text
from apb_ds.weights import check_shard_ranks

SECTIONS = ("model", "method", "task", "parallel", "eval", "objective", "seed", "debug")
PARALLEL_KEYS = ("timeout_s", "shard_ranks", "stages")
MAX_SEED = 2**63 - 1  # torch accepts 64 bits, and a batch adds a number to it for each line


@dataclass(frozen=True)
class Job:
    """One job as it was requested.

    Attributes
    ----------
    values : the composed config, as plain dicts; not validated yet
    run_dir : where the first rank writes the record; None writes no record
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
class EvalConfig:
    """Where an evaluation's results go, and how many samples are answered at a time.

    Parameters
    ----------
    output : str, optional
        A directory. Default: a separate one under ``outputs/results`` for each task, method and model. Samples answered
        there before are not answered again.
    overwrite : bool
        Answer all samples again; the old results are kept.
    sequences : int
        Samples whose answers are decoded together. Their documents are in memory at the same time, as far as there is
        room.
    """

    output: str | None = None
    overwrite: bool = False
    sequences: int = 8

    def __post_init__(self) -> None:
        check_optional_text("eval.output", self.output, "the name of a directory")
        check_bool("eval.overwrite", self.overwrite)
        check_integer("eval.sequences", self.sequences, 1)


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """The settings that make an engine, validated.

    Attributes
    ----------
    retaining_heads : where the heads are, if the compressor needs them
    shard_ranks : how many ranks hold a copy of the weights together, where these are sharded; None for all of them
    stages : into how many stages of a pipeline the model is cut
    """

    model: ModelConfig
    method: APBConfig
    timeout_s: float
    seed: int
    retaining_heads: str | None = None
    shard_ranks: int | None = None
    stages: int = 1


@dataclass(frozen=True, kw_only=True)
class Settings(EngineSettings):
    """A job's settings, validated.

    Attributes
    ----------
    evaluation : for a job that scores its answers, else None
    position_from_template : whether ``method.query_position`` was left to the chat template
    """

    task: TaskConfig
    position_from_template: bool
    evaluation: EvalConfig | None = None

    def method_for(self, query_position: int) -> APBConfig:
        """Return the method's settings with a sample's query position, unless the user gave one."""
        if not self.position_from_template or self.method.is_exact_method:
            return self.method
        return replace(self.method, query_position=query_position)


def read_settings(values: dict[str, Any], num_ranks: int | None = None) -> Settings:
    """Validate a composed config, as far as possible without a model. The result is the same on every rank.

    Parameters
    ----------
    num_ranks : over which weights are sharded, where these are emulated; by default those launched

    Raises
    ------
    ValueError, RuntimeError
        For an unknown key or name, a value out of its range, hosts that do not divide over the ranks, or a kernel
        that is not installed.
    """
    engine = read_engine_settings(values, SECTIONS, num_ranks)
    task = build_task_config(dict(values.get("task") or {}))
    evaluation = None
    if "eval" in values:
        evaluation = from_mapping(EvalConfig, dict(values["eval"] or {}), "eval")
        if type(task).samples is TaskConfig.samples:
            raise ValueError(f"task={task.name} has no reference answers; run it with launch/infer.py.")
    return Settings(
        **vars(engine),
        task=task,
        position_from_template=(values.get("method") or {}).get("query_position") is None,
        evaluation=evaluation,
    )


def read_engine_settings(
    values: dict[str, Any], sections: Sequence[str], num_ranks: int | None = None
) -> EngineSettings:
    """Validate what a composed config says of the engine; see `read_settings`.

    Parameters
    ----------
    sections : that the config may have
    num_ranks : as in `read_settings`
    """
    for key in values:
        check_choice("config key", key, sections)
    method_values = dict(values.get("method") or {})
    heads = method_values.pop(HEADS_KEY, None)
    parallel = dict(values.get("parallel") or {})
    for key in parallel:
        check_choice("parallel key", key, PARALLEL_KEYS)
    stages = 1 if parallel.get("stages") is None else parallel["stages"]
    check_stages(stages, launched_world_size(), name="parallel.stages")
    num_sharing = launched_world_size() // stages
    method = _read_method(method_values, num_sharing)
    timeout_s = parallel.get("timeout_s") or DEFAULT_TIMEOUT_S
    check_integer("parallel.timeout_s", timeout_s, 1)
    seed = values.get("seed") or 0
    check_integer("seed", seed, 0)
    if seed > MAX_SEED:
        raise ValueError(f"seed={seed} must be an integer of at most {MAX_SEED}.")
    model = ModelConfig.from_dict(dict(values.get("model") or {}))
    return EngineSettings(
        model=model,
        method=method,
        timeout_s=timeout_s,
        seed=seed,
        retaining_heads=_heads_of(method, heads, model),
        shard_ranks=read_shard_ranks(parallel, model, num_ranks or num_sharing),
        stages=stages,
    )


def read_shard_ranks(parallel: Mapping[str, Any], model: ModelConfig, num_ranks: int) -> int | None:
    """Return ``parallel.shard_ranks``, which fits the ranks that share a document; ValueError if it does not."""
    shard_ranks: int | None = parallel.get("shard_ranks")
    try:
        check_shard_ranks(shard_ranks, model.shard_weights, num_ranks)
    except ValueError as error:
        named = str(error).replace("shard_ranks", "parallel.shard_ranks")
        raise ValueError(named.replace("shard_weights", "model.shard_weights")) from error
    return shard_ranks


def _read_method(values: dict[str, Any], num_ranks: int) -> APBConfig:
    try:
        method = APBConfig.from_dict(values)
        check_ranks(method, num_ranks)
        check_available(method)
    except ValueError as error:
        raise ValueError(name_keys(str(error), of_method=True)) from error
    except RuntimeError as error:
        raise RuntimeError(name_keys(str(error))) from error
    return method


def _heads_of(method: APBConfig, given: str | None, model: ModelConfig) -> str | None:
    """Return where the compressor's heads are, given or the model's own; None if it needs no heads."""
    check_optional_text(f"method.{HEADS_KEY}", given, "a .pt or .safetensors file, a directory or a hub id")
    if not needs_heads(method.compressor):
        if given is not None:
            raise ValueError(
                f"method.{HEADS_KEY}={given!r} goes with method.compressor={names_with_heads()}, not "
                f"{method.resolved()['compressor']!r}; set that, or leave method.{HEADS_KEY} out."
            )
        return None
    found = given or model.retaining_heads
    if found is None:
        raise ValueError(
            f"method.compressor={method.compressor} needs trained heads, and model.{HEADS_KEY} is not set: set "
            f"method.{HEADS_KEY} to a .pt or .safetensors file, a directory or a hub id, train heads with "
            "launch/train_heads.py, or use another compressor."
        )
    return found
