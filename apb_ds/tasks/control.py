"""Control tokens that somebody writes into a text stay text: only the chat template's own take effect.

A document may contain ``<|im_end|>`` or ``</s>``, by chance or by intent. Tokenizers recognise these wherever they
stand, so what a user's text has of them is put behind a mask before the template is rendered (`mask`), and encoded from
there as the characters that it is (`encode_masked`). Masks have random names, so that no text can contain one. Texts
without such tokens are encoded as ever.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
import weakref
from dataclasses import dataclass
from typing import Any

# Masks of user's texts and of the template's own tokens: nothing of it is white space, which templates trim.
_NAME = secrets.token_hex(8)
_OPEN, _CLOSE = f"\u2402{_NAME}-", "\u2403"


@dataclass(frozen=True)
class ControlTokens:
    """The control tokens of one tokenizer.

    Attributes
    ----------
    ids : by what they look like in a text
    pattern : finds them, longer ones first
    """

    ids: dict[str, int]
    pattern: re.Pattern[str]

    def number_of(self, content: str) -> int:
        return list(self.ids).index(content)

    def content_of(self, number: str) -> str:
        return list(self.ids)[int(number)]


def mask(tokenizer: Any, text: str) -> str:
    """Return the text with its control tokens masked; `encode_masked` gives the ids of the original characters."""
    control = control_tokens(tokenizer)
    if control is None:
        return text
    return control.pattern.sub(lambda found: f"{_OPEN}u{control.number_of(found[0])}{_CLOSE}", text)


def unmask(tokenizer: Any, text: str) -> str:
    """Undo `mask`."""
    control = control_tokens(tokenizer)
    if control is None or _OPEN not in text:
        return text
    return re.sub(f"{_OPEN}u(\\d+){_CLOSE}", lambda found: control.content_of(found[1]), text)


def encode_masked(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text; its control tokens are recognised, masked ones are not. None are added.

    Raises
    ------
    ValueError
        If the tokenizer makes a control token of plain characters, whatever is done.
    """
    control = control_tokens(tokenizer)
    if control is None or _OPEN not in text:
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        # A tokenizer that normalises may find more of them than the eye: full-width letters, say.
        if control is None or _count(ids, control) <= len(control.pattern.findall(text)):
            return ids
    assert control is not None
    ids = _encode_apart(tokenizer, control, text)
    expected = len(control.pattern.findall(text))
    if _count(ids, control) > expected:
        content = next((name for name, number in control.ids.items() if number in ids and name not in text), "it")
        raise ValueError(
            f"the text contains {content!r}, of which this tokenizer makes a control token even where it is text; "
            "take it out, or set task.allow_special_tokens=true if it is meant."
        )
    return ids


def control_tokens(tokenizer: Any) -> ControlTokens | None:
    """Return the tokenizer's control tokens, None if it has none.

    They are its special tokens, and those of its other added tokens that its chat template writes, such as
    ``<tool_call>``; white space is never one.
    """
    added = getattr(tokenizer, "added_tokens_decoder", None)
    if not added:
        return None
    template = getattr(tokenizer, "chat_template", None)
    written = template if isinstance(template, str) else json.dumps(template, ensure_ascii=False)
    ids = {
        token.content: number
        for number, token in added.items()
        if not token.content.isspace() and (token.special or token.content in written)
    }
    return _control_tokens(tuple(ids.items())) if ids else None


@functools.lru_cache(maxsize=16)
def _control_tokens(items: tuple[tuple[str, int], ...]) -> ControlTokens:
    ids = dict(items)
    return ControlTokens(ids, re.compile("|".join(map(re.escape, sorted(ids, key=len, reverse=True)))))


def _count(ids: list[int], control: ControlTokens) -> int:
    numbers = set(control.ids.values())
    return sum(number in numbers for number in ids)


def _encode_apart(tokenizer: Any, control: ControlTokens, text: str) -> list[int]:
    """Return the ids of a text in which control tokens take effect and masked ones are plain characters."""
    renamed = _renamed_tokenizer(tokenizer, control)
    if renamed is None:
        return _encode_pieces(tokenizer, control, text)
    text = control.pattern.sub(lambda found: _own_name(control.number_of(found[0])), text)
    ids = renamed.encode(unmask(tokenizer, text), add_special_tokens=False).ids
    own = {renamed.token_to_id(_own_name(place)): number for place, number in enumerate(control.ids.values())}
    return [own.get(number, number) for number in ids]


def _encode_pieces(tokenizer: Any, control: ControlTokens, text: str) -> list[int]:
    """Do as `_encode_apart` for a tokenizer in Python: piece by piece."""
    ids: list[int] = []
    for place, piece in enumerate(re.split(f"{_OPEN}u(\\d+){_CLOSE}", text)):
        is_masked = place % 2 == 1
        options = {"split_special_tokens": True} if is_masked else {}
        piece = control.content_of(piece) if is_masked else piece
        if piece:
            ids += tokenizer(piece, add_special_tokens=False, verbose=False, **options)["input_ids"]
    return ids


_RENAMED: weakref.WeakKeyDictionary[Any, tuple[ControlTokens, Any]] = weakref.WeakKeyDictionary()


def _renamed_tokenizer(tokenizer: Any, control: ControlTokens) -> Any:
    """Return a copy of a fast tokenizer whose control tokens have names that no text contains; None for other kinds.

    So the control tokens' own characters are nothing special to it, and where a text is cut is as it was.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return None
    known = _RENAMED.get(tokenizer)
    if known is not None and known[0] == control:
        return known[1]
    values = json.loads(backend.to_str())
    for token in values["added_tokens"]:
        if token["content"] in control.ids:
            token["content"] = _own_name(control.number_of(token["content"]))
    renamed = Tokenizer.from_str(json.dumps({**values, "post_processor": None, "truncation": None, "padding": None}))
    _RENAMED[tokenizer] = control, renamed
    return renamed


def _own_name(number: int) -> str:
    return f"{_OPEN}t{number}{_CLOSE}"
