"""Where a prompt of the harness is cut: into the document, and the query after it.

The harness passes one text: instructions, examples, a document, a question, perhaps the beginning of the answer, as a
rendered chat or as plain text. Only the user's last turn is searched (all of a plain text):

===========  ==========================================================================================================
paragraph    the query begins after the turn's last blank line; if it would be longer than all before it, or there is no
             blank line, at the last line
line         at the last line
turn         at the beginning of the turn: earlier turns, such as solved examples, are the document
===========  ==========================================================================================================

A turn of a single line is the query. What follows the turn (its end in the template, the answer's beginning) belongs
to the query.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from apb_ds.config import check_choice

SPLITS = ("paragraph", "line", "turn")
BLANK_LINE = re.compile(r"\n\s*\n")

Split = Callable[[str], tuple[str, str]]


class RenderedPrompt(str):
    """A rendered chat that knows where the user's last turn is; to the harness it is an ordinary string.

    Attributes
    ----------
    turn : index of the turn's first character, and of the one after its last
    header : what the template puts before the first user's text, the system prompt included
    """

    turn: tuple[int, int]
    header: str

    def __new__(cls, text: str, turn: tuple[int, int] = (0, 0), header: str = "") -> RenderedPrompt:
        rendered = super().__new__(cls, text)
        rendered.turn = turn
        rendered.header = header
        return rendered


def mark_turn(text: str, messages: list[dict[str, str]], header: str) -> str:
    """Return a rendered chat with the position of the user's last turn, if it contains that unchanged."""
    said = [message["content"].strip() for message in messages if message["role"] == "user"]
    start = text.rfind(said[-1]) if said and said[-1] else -1
    return text if start < 0 else RenderedPrompt(text, (start, start + len(said[-1])), header)


def make_split(rule: str | Split, query_start: str | None = None) -> Split:
    """Return the function that cuts a prompt into document and query.

    Parameters
    ----------
    rule : a name in `SPLITS`, or a function of the prompt that returns the two
    query_start : a text; the query begins at its last occurrence in the turn, or by the rule if there is none

    Raises
    ------
    ValueError
        For an unknown rule. The returned function raises it if the caller's function loses or adds text.
    """
    if not callable(rule):
        check_choice("split", rule, SPLITS)
        return lambda prompt: _cut(prompt, str(rule), query_start)
    return lambda prompt: _checked(prompt, rule(prompt))


def _cut(prompt: str, rule: str, query_start: str | None) -> tuple[str, str]:
    start, end = getattr(prompt, "turn", (0, len(prompt)))
    cut = prompt.rfind(query_start, start, end) if query_start else -1
    if cut < 0:
        cut = _query_index(prompt, start, end, rule)
    return prompt[:cut], prompt[cut:]


def _query_index(prompt: str, start: int, end: int, rule: str) -> int:
    """Return the index of the query's first character."""
    text = prompt[start:end].rstrip()
    offsets = []
    if rule == "paragraph":
        offsets += [match.end() for match in BLANK_LINE.finditer(text)][-1:]
    if rule in ("paragraph", "line"):
        offsets += [offset for offset in [text.rfind("\n") + 1] if offset > 0]
    for offset in offsets:
        if end - start - offset <= start + offset:
            return start + offset
    return start + offsets[-1] if offsets else start


def _checked(prompt: str, parts: tuple[str, str]) -> tuple[str, str]:
    document, query = parts
    if document + query != prompt:
        raise ValueError(
            f"split must return document and query that together are the prompt; it returned {len(document)} and "
            f"{len(query)} characters of {len(prompt)}."
        )
    return document, query
