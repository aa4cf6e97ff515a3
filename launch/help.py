"""``--help``: all settings on one screen; ``--help all`` or ``--help method`` has their meanings, too.

A setting's meaning is the comment in the config file that sets it.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from apb_ds.config import check_choice

from .arguments import SWEEP, split_config_directory
from .errors import CONFIGS, GROUPS

WIDTH = 100
NAME_WIDTH = 25
VALUE_WIDTH = 18
MAX_VALUE = 60
SHORT = 24  # characters of a value that stands next to its name
SPACE = "\N{NO-BREAK SPACE}"  # within a value
SHOWN_AS_GROUPS = ("task.name",)
ALL = "all"  # of --help
COLLAPSED = ("model.geometry",)  # fields of somebody else's config
FLAGS = {
    "-m": "run all combinations of comma-separated values: method.hosts=4,8",
    "--cfg job": "print the composed config",
    "--config-dir DIR": "add a folder of configs",
    "--version": "print the version",
    "--hydra-help": "Hydra's own flags, tab completion among them",
}
_SETTING = re.compile(r"( *)(\w+):(?: (?:[^#]|(?<! )#)*)?(?:#\s?(.*))?")


def help_text(config_name: str, arguments: Sequence[str]) -> str:
    """Return the help of a command for what its arguments choose, such as ``task=prompt``.

    A word among the arguments is what to explain: ``all`` settings, or a section's.

    Raises
    ------
    HydraException, OmegaConfBaseException
        If the arguments do not compose.
    ValueError
        For a word that is not a section.
    """
    directory, overrides = split_config_directory(arguments)
    overrides = [] if any(flag in SWEEP for flag in arguments) else overrides
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        added = [f"hydra.searchpath=[{directory}]"] if directory else []
        config = compose(config_name, [*overrides, *added], return_hydra_config=True)
    chosen = {str(group): str(name) for group, name in config.hydra.runtime.choices.items()}
    folders = [Path(directory).expanduser(), CONFIGS] if directory else [CONFIGS]
    meanings = meanings_in(CONFIGS / f"{config_name}.yaml")
    groups = [group for group in GROUPS if group in chosen]
    for group in groups:
        found = _group_meanings(folders, group, chosen[group])
        meanings |= {f"{group}.{key}": meaning for key, meaning in found.items()}
    script = f"launch/{config_name}.py"
    lines = [_description(CONFIGS / f"{config_name}.yaml"), "", f"{script} [FLAGS] KEY=VALUE ...", "", "Groups"]
    for group in groups:
        names = sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})
        lines += _row(f"{group}={chosen[group]}", "", ", ".join(names))
    names = sorted({file.stem for folder in folders for file in (folder / "exp").glob("*.yaml")})
    lines += [*_row("+exp=NAME", "", ", ".join(names)), "", "Settings"]
    values = OmegaConf.to_container(config, resolve=False)
    assert isinstance(values, dict)
    settings = {
        path: _shown(value)
        for path, value in _settings({str(key): value for key, value in values.items() if key != "hydra"})
        if path not in SHOWN_AS_GROUPS
    }
    sections = dict.fromkeys(path.partition(".")[0] for path in settings)
    topics = [word for word in arguments if "=" not in word and not word.startswith("-") and word != directory]
    for topic in topics:
        check_choice("--help", topic, [ALL, *sections])
    if not topics:
        lines[-1] += f" (--help {ALL} explains them, --help {next(iter(sections))} those of a section)"
    for section in sections:
        paths = [path for path in settings if path.partition(".")[0] == section]
        if section in topics or ALL in topics:
            for path in paths:
                lines += _row(path, settings[path], meanings.get(path, ""))
        elif not topics:
            lines += _paragraph(section, {path.removeprefix(f"{section}."): settings[path] for path in paths})
    if topics and ALL not in topics:
        return "\n".join(lines[lines.index("Settings") + 1 :])
    lines += ["", "Flags"]
    for flag, meaning in FLAGS.items():
        lines += _row(flag, "", meaning)
    return "\n".join(lines)


def meanings_in(file: Path) -> dict[str, str]:
    """Return the comments of a config file by dotted path: the one on a key's line, or those right above it."""
    meanings: dict[str, str] = {}
    above: list[str] = []
    parents: list[tuple[int, str]] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("#"):
            above.append(line.lstrip("# "))
            continue
        setting = _SETTING.fullmatch(line)
        if setting:
            indent, name, comment = len(setting[1]), setting[2], setting[3]
            parents = [*(parent for parent in parents if parent[0] < indent), (indent, name)]
            meanings[".".join(name for _, name in parents)] = comment or " ".join(above)
        above = []
    return {path: meaning for path, meaning in meanings.items() if meaning}


def _group_meanings(folders: Sequence[Path], group: str, name: str) -> dict[str, str]:
    """Return the comments of a group's option, with those of the options it derives from."""
    file = next((path for folder in folders if (path := folder / group / f"{name}.yaml").is_file()), None)
    if file is None:
        return {}
    meanings: dict[str, str] = {}
    content = OmegaConf.load(file)
    assert isinstance(content, DictConfig)
    for base in content.get("defaults", []):
        if isinstance(base, str) and base != "_self_":
            meanings |= _group_meanings(folders, group, base)
    return meanings | meanings_in(file)


def _description(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return textwrap.fill(" ".join(line.lstrip("# ") for line in lines[:first]), WIDTH)


def _settings(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value and path not in COLLAPSED:
            yield from _settings(value, f"{path}.")
        else:
            yield path, value


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "{...}" if value else "{}"
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    text = "[" + ", ".join(str(item) for item in value) + "]" if isinstance(value, list) else str(value)
    text = text.replace("\n", r"\n")
    return text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 3] + "..."


def _paragraph(section: str, settings: dict[str, str]) -> list[str]:
    """Return a section's settings as one paragraph, with the values that they have; null is not shown."""
    shown = [
        name if value in ("null", "") or len(value) > SHORT else f"{name}={value}" for name, value in settings.items()
    ]
    head = "" if list(settings) == [section] else f"{section}. "
    lines = textwrap.wrap(
        head + ", ".join(word.replace(" ", SPACE) for word in shown),
        WIDTH,
        initial_indent="  ",
        subsequent_indent="    " if head else "  ",
        break_on_hyphens=False,
        break_long_words=False,
    )
    return [line.replace(SPACE, " ") for line in lines]


def _row(name: str, value: str, meaning: str) -> list[str]:
    """Return a setting as lines of at most `WIDTH` characters; a long value has the first one for itself."""
    head = f"  {name:{NAME_WIDTH}} {value:{VALUE_WIDTH}} " if value else f"  {name:{NAME_WIDTH}} "
    indent = NAME_WIDTH + 3 + (VALUE_WIDTH + 1 if value else 0)
    lines = textwrap.wrap(meaning, WIDTH - indent)
    if len(head) > indent or not lines:
        return [head.rstrip(), *(" " * indent + line for line in lines)]
    return [head + lines[0], *(" " * indent + line for line in lines[1:])]
