"""Hydra's errors in this project's words: what is wrong, what is allowed, and how to quote it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from apb_ds.config import suggest

from .quoting import quote, split_elements, unquoted

CONFIGS = Path(__file__).resolve().parents[1] / "configs"  # in a checkout and in an installed package
GROUPS = ("method", "model", "parallel", "task")
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
        return _missing(str(error.missing_cfg_file).removesuffix(".yaml"), error.options)
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
    unknown = re.search(r"Key '([^']+)' is not in struct\s+full_key: (\S+)", message)
    if unknown:
        return _unknown_key(*unknown.groups())
    return message


def _missing(file: str, options: Sequence[str] | None) -> str:
    """Return that a group has no such option, and what it has."""
    group, _, name = file.partition("/")
    if not (CONFIGS / group).is_dir() or group == "hydra":
        group, _, name = file.rpartition("/")
    names = sorted(options or _names_in(group))
    if group == "model" and (name.count("/") or name.endswith(".gguf") or Path(name).exists()):
        return f"model={name} is not one of {', '.join(names)}. For a folder, a file or a hub id: model.path={name}"
    return f"{group}={name} does not exist; use one of {', '.join(names)}.{suggest(name, names)}"


def _unknown_key(key: str, path: str) -> str:
    """Return that a key does not exist, and the key or the group's option that was probably meant."""
    section = path.rpartition(".")[0]
    if not section:
        return _unknown_section(key)
    files = _files_with_keys(section)
    owners = sorted((name for name, keys in files.items() if key in keys), key=lambda name: (name != "prompt", name))
    if owners:
        options = [f"{section}={name}" for name in owners]
        return f"{path} is a setting of {', '.join(options)}, not of the present {section}. Add {options[0]}."
    near = suggest(key, sorted({name for keys in files.values() for name in keys}))
    return f"{path} does not exist.{near or f' To add it all the same: +{path}=...'}"


def _unknown_section(key: str) -> str:
    """Return that a key without a dot does not exist, and whose it is."""
    scripts = _files_with_keys("")
    owners = [f"launch/{name}.py" for name, keys in sorted(scripts.items()) if key in keys]
    if owners:
        return f"{key} is a setting of {', '.join(owners)}, not of this command."
    for group in GROUPS:
        if any(key in keys for keys in _files_with_keys(group).values()):
            return f"{key} does not exist. Did you mean '{group}.{key}'?"
    known = {*GROUPS, *(name for keys in scripts.values() for name in keys)} - {key}
    return f"{key} does not exist here.{suggest(key, sorted(known))}"


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


def _files_with_keys(section: str) -> dict[str, set[str]]:
    """Return the keys of each file of a config section; of the scripts' own files for an empty one."""
    files = (CONFIGS / section.replace(".", "/")).glob("*.yaml")
    return {file.stem: {str(key) for key in OmegaConf.load(file)} - {"defaults", "hydra"} for file in files}
