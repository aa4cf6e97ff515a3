"""Where a prompt of the harness is cut: the document before, the query from there on.

The harness hands over one text: instructions, examples, a document, a question, perhaps the beginning of the answer,
as turns of a chat or as they stand. Only the last user's turn is looked at (all of the text where there is no chat):

===========  ==========================================================================================================
paragraph    the query begins after the last blank line of that turn; if that is longer than all before it, or there is
             no blank line, at the last line
line         at the last line
turn         at the turn itself: earlier turns, such as solved examples, are the document
===========  ==========================================================================================================

A turn of a single line is the query as a whole. What comes after the turn (the template's end of it, the answer's
beginning) belongs to the query.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from apb_ds.config import check_choice

SPLITS = ("paragraph", "line", "turn")
BLANK_LINE = re.compile(r"\n\s*\n")

Split = Callable[[str], tuple[str, str]]


class RenderedPrompt(str):
    """A chat as text, which knows where its last user's turn is; the harness takes it for any other string.

    Attributes
    ----------
    turn : first character of what the user says last, and the one after it
    """

    turn: tuple[int, int]

    def __new__(cls, text: str, turn: tuple[int, int] = (0, 0)) -> RenderedPrompt:
        rendered = super().__new__(cls, text)
        rendered.turn = turn
        return rendered


def render(text: str, messages: list[dict[str, str]]) -> str:
    """Return a rendered chat with the place of its last user's turn, if that can be found in it."""
    said = [message["content"].strip() for message in messages if message["role"] == "user"]
    start = text.rfind(said[-1]) if said and said[-1] else -1
    return text if start < 0 else RenderedPrompt(text, (start, start + len(said[-1])))


def make_split(rule: str | Split, query_start: str | None = None) -> Split:
    """Return the function that cuts a prompt into document and query.

    Parameters
    ----------
    rule : a name in `SPLITS`, or a function of the prompt that returns the two
    query_start : a text; the query begins where it is found last in the turn, or by the rule if it is not there

    Raises
    ------
    ValueError
        For an unknown rule. The function raises it where a rule of the caller's loses or adds text.
    """
    if not callable(rule):
        check_choice("split", rule, SPLITS)
        return lambda prompt: _cut(prompt, str(rule), query_start)
    return lambda prompt: _checked(prompt, rule(prompt))


def _cut(prompt: str, rule: str, query_start: str | None) -> tuple[str, str]:
    start, end = getattr(prompt, "turn", (0, len(prompt)))
    place = prompt.rfind(query_start, start, end) if query_start else -1
    if place < 0:
        place = _place(prompt, start, end, rule)
    return prompt[:place], prompt[place:]


def _place(prompt: str, start: int, end: int, rule: str) -> int:
    """Return where the query begins."""
    text = prompt[start:end].rstrip()
    places = []
    if rule == "paragraph":
        places += [match.end() for match in BLANK_LINE.finditer(text)][-1:]
    if rule in ("paragraph", "line"):
        places += [place for place in [text.rfind("\n") + 1] if place > 0]
    for place in places:
        if end - start - place <= start + place:
            return start + place
    return start + places[-1] if places else start


def _checked(prompt: str, parts: tuple[str, str]) -> tuple[str, str]:
    document, query = parts
    if document + query != prompt:
        raise ValueError(
            f"split must return document and query that together are the prompt; it made {len(document)} and "
            f"{len(query)} characters of {len(prompt)}."
        )
    return document, query
