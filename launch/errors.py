"""Hydra's errors in this project's words: what is wrong, what is allowed, and how to quote it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from apb_ds.config import suggest

from .quoting import quote, split_elements, unquoted

CONFIGS = Path(__file__).resolve().parents[1] / "configs"  # in a checkout and in an installed package
NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_.$@:/+~-]")
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
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    several = re.match(r"Ambiguous value for argument '([^=]+)=(.*?)'\n1\. ", message, re.DOTALL)
    if several:
        key, value = several.groups()
        text = ",".join(map(unquoted, split_elements(value)))
        return (
            f"{key}={value} has several values: add -m to run each of them; a list is '{key}=[{value}]', a text "
            f"{_quoted(key, text)}."
        )
    if isinstance(error, InterpolationResolutionError):
        message += "\n" + INTERPOLATION_HINT
    unknown = re.search(r"Key '(\w+)' is not in struct\s+full_key: ([\w.]+)", message)
    if unknown:
        section = unknown.group(2).rpartition(".")[0]
        message += suggest(unknown.group(1), _keys_of(section)).replace(" Did", "\nDid")
    return message


def _unreadable(argument: str) -> str:
    """Return what is wrong with an argument that Hydra cannot read."""
    key, equals, value = argument.partition("=")
    if not equals:
        return f"{argument!r} is not key=value. Quote a value that has spaces: 'task.query=Who signed it?'"
    odd = "".join(dict.fromkeys(NOT_IN_KEYS.findall(key)))
    if odd or not key:
        return f"{argument!r}: the key {key!r} cannot have {odd!r}; keys have ASCII letters, digits, _, - and dots."
    return f"the value of {key} cannot be read: {value!r}. If it is a text, quote it: {_quoted(key, value)}"


def _quoted(key: str, value: str) -> str:
    """Return an override with its value quoted, for Hydra and for the shell."""
    return shlex.quote(f"{key}={quote(value)}")


def _names_in(group: str) -> list[str]:
    return [file.stem for file in (CONFIGS / group).glob("*.yaml")]


def _keys_of(section: str) -> list[str]:
    """Return the keys that any file of a config section has."""
    keys: set[str] = set()
    for file in (CONFIGS / section.replace(".", "/")).glob("*.yaml"):
        keys |= {str(key) for key in OmegaConf.load(file)}
    return sorted(keys - {"defaults"})
