"""Control tokens written in a text stay text: only the chat template's own take effect.

A document may contain ``<|im_end|>`` or ``</s>``, by chance or by intent, and tokenizers recognise these anywhere. So
they are masked before the template is rendered (`mask`), and encoded from there as plain characters (`encode_masked`).
Masks have random names that no text can contain. Texts without such tokens are encoded as usual.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
import weakref
from dataclasses import dataclass
from typing import Any

# Masks of control tokens in users' texts (u) and names for the template's own (t). They contain no white space, which
# templates trim.
_NAME = secrets.token_hex(8)
_OPEN, _CLOSE = f"\u2402{_NAME}-", "\u2403"
_MASKED = re.compile(f"{_OPEN}u(\\d+){_CLOSE}")


@dataclass(frozen=True)
class ControlTokens:
    """The control tokens of one tokenizer.

    Attributes
    ----------
    ids : by how they are written in a text
    pattern : finds them, longer ones first
    """

    ids: dict[str, int]
    pattern: re.Pattern[str]

    def number_of(self, content: str) -> int:
        return list(self.ids).index(content)

    def content_of(self, number: str) -> str:
        return list(self.ids)[int(number)]

    def count(self, ids: list[int]) -> int:
        """Return how many of `ids` are control tokens."""
        numbers = set(self.ids.values())
        return sum(number in numbers for number in ids)


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
    return _MASKED.sub(lambda found: control.content_of(found[1]), text)


def encode_masked(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text, with its control tokens recognised and masked ones as text. No tokens are added.

    Raises
    ------
    ValueError
        If the tokenizer insists on making a control token of plain characters.
    """
    control = control_tokens(tokenizer)
    if control is None:
        return _plain_ids(tokenizer, text)
    expected = len(control.pattern.findall(text))
    if _OPEN not in text:
        ids = _plain_ids(tokenizer, text)
        # A tokenizer that normalises may find more than the pattern, such as full-width letters.
        if control.count(ids) <= expected:
            return ids
    ids = _encode_apart(tokenizer, control, text)
    if control.count(ids) > expected:
        content = next((name for name, number in control.ids.items() if number in ids and name not in text), "it")
        raise ValueError(
            f"the text contains {content!r}, which this tokenizer turns into a control token even as text; remove it, "
            "or set task.allow_special_tokens=true if that is intended."
        )
    return ids


def control_tokens(tokenizer: Any) -> ControlTokens | None:
    """Return the tokenizer's control tokens, None if it has none.

    They are its special tokens, and those other added tokens that its chat template writes, such as ``<tool_call>``;
    white space never is one.
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


def _plain_ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"])


def _encode_apart(tokenizer: Any, control: ControlTokens, text: str) -> list[int]:
    """Return the ids of a text in which control tokens take effect and masked ones are plain characters."""
    renamed = _renamed_tokenizer(tokenizer, control)
    if renamed is None:
        return _encode_pieces(tokenizer, control, text)
    text = control.pattern.sub(lambda found: _own_name(control.number_of(found[0])), text)
    ids = renamed.encode(unmask(tokenizer, text), add_special_tokens=False).ids
    own = {renamed.token_to_id(_own_name(index)): number for index, number in enumerate(control.ids.values())}
    return [own.get(number, number) for number in ids]


def _encode_pieces(tokenizer: Any, control: ControlTokens, text: str) -> list[int]:
    """Do the same as `_encode_apart` piece by piece, for a tokenizer in Python."""
    ids: list[int] = []
    for index, piece in enumerate(_MASKED.split(text)):
        if index % 2:  # a masked token
            ids += _plain_ids(tokenizer, control.content_of(piece), split_special_tokens=True)
        elif piece:
            ids += _plain_ids(tokenizer, piece)
    return ids


_RENAMED: weakref.WeakKeyDictionary[Any, tuple[ControlTokens, Any]] = weakref.WeakKeyDictionary()


def _renamed_tokenizer(tokenizer: Any, control: ControlTokens) -> Any:
    """Return a copy of a fast tokenizer whose control tokens have names that no text contains; None for other kinds.

    To the copy the control tokens' characters are ordinary ones, and it splits text where the original does.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return None
    tokenizer = getattr(tokenizer, "wrapped", tokenizer)  # one copy for all that a tokenizer is wrapped in
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
