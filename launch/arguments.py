"""Command-line arguments as Hydra takes them: flags first, values quoted, no files from ranks other than 0."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from apb_ds.config import suggest

from .quoting import has_several_values, readable, unquoted

LOCAL_RANK = ("--local_rank", "--local-rank")
HELP = ("-h", "--help")
SWEEP = ("-m", "--multirun")
SWEEP_MODE = "hydra.mode=MULTIRUN"
CONFIG_DIRECTORY = ("-cd", "--config-dir")
FLAGS = (
    *HELP,
    *SWEEP,
    *CONFIG_DIRECTORY,
    *("--version", "--hydra-help", "-sc", "--shell-completion", "-r", "--run", "--experimental-rerun"),
    *("-c", "--cfg", "--resolve", "-p", "--package", "-i", "--info", "-cp", "--config-path", "-cn", "--config-name"),
)
LEAVES_FILES = (
    "hydra/job_logging=",
    "hydra/hydra_logging=",
    "hydra.run.dir=",
    "hydra.sweep.dir=",
    "hydra.output_subdir=",
)


def for_hydra(arguments: Sequence[str]) -> list[str]:
    """Return the arguments without what the launcher adds, -m and --config-dir first, values as Hydra can read them.

    Hydra's parser rejects overrides that follow a flag that follows overrides.
    """
    flags: list[str] = []
    others: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        name = argument.partition("=")[0]
        if name in LOCAL_RANK:
            continue
        if argument in CONFIG_DIRECTORY:
            value = list(itertools.islice(remaining, 1))
            (flags if value else others).extend([argument, *value])
        elif argument in SWEEP or name in CONFIG_DIRECTORY:
            flags.append(argument)
        else:
            others.append(argument)
    in_sweep = SWEEP_MODE in others or any(flag in SWEEP for flag in flags)
    return [*flags, *(readable(argument, in_sweep=in_sweep) for argument in others)]


def check_flags(arguments: Sequence[str]) -> None:
    """Raise ValueError for a flag that does not exist, naming the nearest."""
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("-") and name not in (*FLAGS, *LOCAL_RANK):
            raise ValueError(f"{name} is not a flag.{suggest(name, FLAGS)} --help lists the settings and flags.")


def split_config_directory(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the folder that --config-dir names, and the overrides among the arguments."""
    directory, overrides = None, []
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name in CONFIG_DIRECTORY:
            directory = value if equals else next(remaining, None)
        elif equals and not name.startswith("-"):
            overrides.append(argument)
    return directory, overrides


def without_files(arguments: Sequence[str], scratch: Path) -> list[str]:
    """Return the arguments for a rank that leaves no run directory and no log behind."""
    return [
        *(argument for argument in arguments if not argument.startswith(LEAVES_FILES)),
        f"hydra.run.dir={scratch}",
        f"hydra.sweep.dir={scratch}",
        "hydra.output_subdir=null",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
    ]


def overrides_of(arguments: Sequence[str]) -> dict[str, str]:
    """Return what command-line arguments change, by config path, texts without their quotes."""
    overrides = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        overrides[name.lstrip("+~")] = unquoted(value)
    return overrides


def swept_keys(arguments: Sequence[str]) -> set[str]:
    """Return the config paths to which arguments give several values."""
    return {argument.partition("=")[0].lstrip("+") for argument in arguments if has_several_values(argument)}
