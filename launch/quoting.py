"""Values of overrides as Hydra's parser takes them: texts as they were typed, other values quoted where it needs that.

Hydra's grammar has no place for most characters outside ASCII, nor for ``! # & ;`` and some more, and reads text that
looks like a number as one. What Hydra can read stays as it is, except for texts.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

STOP = "task.stop"
FILES_OR_TEXTS = ("task.document", "task.query", "task.system")
TEXTS = (*FILES_OR_TEXTS, STOP, "task.query_start", "serve.split", "serve.api_key", "serve.model_name")
ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\n": r"\n", r"\\t": r"\t"}

_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"|' r"'(?:[^'\\]|\\.)*'", re.DOTALL)
_FUNCTION = r"(?:bool|choice|float|glob|int|interval|range|shuffle|sort|str|tag) ?\("
_CONTAINER = re.compile(rf"\s*(\[|\{{|{_FUNCTION})(.*)([\])}}])\s*", re.DOTALL)
_CLOSING = {"[": "]", "{": "}", "(": ")"}
_ESCAPED = re.compile(r"\\([()\[\]{}:=, \t\\])")  # as Hydra has them outside of quotes


def readable(argument: str, *, in_sweep: bool) -> str:
    """Return a ``key=value`` argument as Hydra can read it; anything else, and what nothing helps, as it is.

    Parameters
    ----------
    in_sweep : whether commas separate values, also those of a text
    """
    key, equals, value = argument.partition("=")
    if not equals or key.startswith(("-", "~")):
        return argument
    name = key.lstrip("+")
    if name in TEXTS:
        read = functools.partial(_text, name)
        elements = [part.strip().replace(r"\,", ",") for part in split_elements(value)] if in_sweep else [value]
        return f"{key}={','.join(map(read, elements))}"
    if parses(argument):
        return argument
    quoted = f"{key}={','.join(map(_plain, split_elements(value)))}"
    return quoted if parses(quoted) else argument


def quote(text: str) -> str:
    """Return the text as a quoted value."""
    return QuotedString(text, Quote.double).with_quotes()


def unquoted(value: str) -> str:
    """Return a value as people would type it: without the quotes around all of it, newlines and tabs as escapes."""
    if not _QUOTED.fullmatch(value):
        return value
    return _text_in(value).replace("\n", r"\n").replace("\t", r"\t")


def parses(argument: str) -> bool:
    """Whether Hydra can read the argument."""
    try:
        _parser().parse_override(argument)
    except HydraException:
        return False
    return True


def has_several_values(argument: str) -> bool:
    """Whether the argument is swept over."""
    try:
        return bool(_parser().parse_override(argument).is_sweep_override())
    except HydraException:
        return False


def split_elements(value: str) -> list[str]:
    """Return what the commas outside of quotes and brackets separate; all of it where brackets do not match."""
    parts, closing = [], []
    start = place = 0
    may_quote = True  # quotes begin an element; inside of one they are characters
    while place < len(value):
        character = value[place]
        quoted = _QUOTED.match(value, place) if may_quote else None
        if quoted:
            place = quoted.end()
            may_quote = False
            continue
        if character == "\\":
            place += 2
            may_quote = False
            continue
        if character in _CLOSING:
            closing.append(_CLOSING[character])
        elif closing and character == closing[-1]:
            closing.pop()
        elif character == "," and not closing:
            parts.append(value[start:place])
            start = place + 1
        may_quote = character in "[{(,:=" or (may_quote and character.isspace())
        place += 1
    return [value] if closing else [*parts, value[start:]]


def _text(name: str, value: str) -> str:
    """Return one text of a setting, quoted."""
    if not value or value.lower() == "null":
        return value
    if (name == STOP and value.startswith("[")) or value.startswith("choice("):
        inside = _inside(value, lambda item: _text(name, item.strip()))
        if inside is not None:
            return inside
    elif re.match(_FUNCTION, value):
        return _plain(value)
    text = _text_in(value) if _QUOTED.fullmatch(value) else value
    names_file = name in FILES_OR_TEXTS and text.startswith("@") and not text.startswith("@@")
    return quote(text if names_file else re.sub(r"\\\\?[nt]", lambda found: ESCAPES[found[0]], text))


def _plain(value: str) -> str:
    """Return a value as it is if Hydra can read it; else quoted, or with what is inside of its brackets quoted."""
    if parses(f"key={value}"):
        return value
    inside = _inside(value, _plain)
    if inside is None:
        is_broken = value.lstrip()[:1] in ("[", "{")  # more likely a list or mapping than a text
        return value if is_broken else quote(_ESCAPED.sub(r"\1", value.strip()))
    return inside


def _inside(value: str, rewrite: Callable[[str], str]) -> str | None:
    """Return a list, mapping or function call with each of its values rewritten; None for anything else."""
    found = _CONTAINER.fullmatch(value)
    if not found or found[3] != _CLOSING[found[1][-1]]:
        return None
    items = []
    for item in split_elements(found[2]):
        key, colon, element = item.partition(":") if found[1] == "{" else ("", "", item)
        items.append(f"{key}{colon}{rewrite(element)}")
    return found[1] + ",".join(items) + found[3]


def _text_in(quoted: str) -> str:
    text = _parser().parse_rule(quoted, "primitive")
    assert isinstance(text, QuotedString)
    return str(text.text)


@functools.cache
def _parser() -> OverridesParser:
    return OverridesParser.create()
