"""Hydra's errors in this project's words: what is wrong, what is allowed, and how to quote it."""

from __future__ import annotations

import re
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from apb_ds.config import suggest

CONFIGS = Path(__file__).resolve().parents[1] / "configs"  # in a checkout and in an installed package
QUOTING_HINT = (
    "Quote a text that contains commas, colons, equals signs, quotes or brackets twice, once for the shell and once "
    "for Hydra: 'task.query=\"Who, and when?\"'; or put it in a file: task.query=@question.txt."
)
INTERPOLATION_HINT = "Write ${ as \\${ in a text, or put the text in a file: task.query=@question.txt."


def describe(error: Exception) -> str:
    """Return a config error as a message for users, with the closest valid name if there is one."""
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        return f"cannot write the run directory ({error}); set hydra.run.dir, or hydra.sweep.dir with -m."
    message = str(error).strip()
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and str(cause).strip() not in message:
        message += "\n" + str(cause).strip()
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).removesuffix(".yaml").rpartition("/")
        names = sorted(error.options or _names_in(group))
        return f"{group}={name} does not exist; use one of {', '.join(names)}.{suggest(name, names)}"
    if "Ambiguous value" in message or type(error).__name__ == "OverrideParseException":
        message += "\n" + QUOTING_HINT
    if isinstance(error, InterpolationResolutionError):
        message += "\n" + INTERPOLATION_HINT
    unknown = re.search(r"Key '(\w+)' is not in struct\s+full_key: ([\w.]+)", message)
    if unknown:
        section = unknown.group(2).rpartition(".")[0]
        message += suggest(unknown.group(1), _keys_of(section)).replace(" Did", "\nDid")
    return message


def _names_in(group: str) -> list[str]:
    return [file.stem for file in (CONFIGS / group).glob("*.yaml")]


def _keys_of(section: str) -> list[str]:
    """Return the keys that any file of a config section has."""
    keys: set[str] = set()
    for file in (CONFIGS / section.replace(".", "/")).glob("*.yaml"):
        keys |= {str(key) for key in OmegaConf.load(file)}
    return sorted(keys - {"defaults"})
