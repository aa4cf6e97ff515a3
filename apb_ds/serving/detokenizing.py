"""Text of tokens as they come, one at a time, and of single tokens."""

from __future__ import annotations

import re
from typing import Any

from apb_ds.engine.stop_text import INCOMPLETE, MORE_BYTES

# Tokens without a whole character at their end, after which their text is taken as it is: garbage, not UTF-8.
MAX_OPEN_TOKENS = 16
FIRST_OPEN = 0x80  # bytes from here on are parts of characters
SPACE_MARK = "\u2581"  # how SentencePiece writes a space

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def find_special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of tokens that are not text, such as those that end a turn."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return frozenset(tokenizer.all_special_ids) | {token for token, of in added.items() if of.special}


class Detokenizer:
    """Decodes tokens one at a time; what it returns adds up to the text of all of them.

    Each token is decoded with a few before it, since decoders treat the first token in a way of their own (the leading
    space of SentencePiece), and with those after it that complete a character.

    Parameters
    ----------
    tokenizer : the model's
    before : ids that the text goes on from, which are not part of it
    """

    def __init__(self, tokenizer: Any, before: list[int] | None = None) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before or [])  # the latest tokens, of which the first `_num_done` are complete text
        self._num_done = len(self._ids)
        self._num_given = len(self._decode(self._ids))  # characters of the latest tokens' text that were returned

    def add(self, token: int) -> str:
        """Return the text that is certain with one more token: empty while a character is incomplete."""
        if len(self._ids) == self._num_done and self._byte(token) >= FIRST_OPEN:
            self._forget_bytes()
        self._ids.append(token)
        text = self._decode(self._ids)
        whole = text
        if len(self._ids) - self._num_done <= MAX_OPEN_TOKENS:
            whole = _without_open_end(text)
        new = whole[self._num_given :]
        self._num_given = max(self._num_given, len(whole))
        if whole == text:  # the next token is decoded after this one and others since the last whole character
            del self._ids[: self._num_done]
            self._num_done = len(self._ids)
            self._num_given = len(self._decode(self._ids))
        return new

    def end(self) -> str:
        """Return the text that was held back, once no more tokens come."""
        return self._decode(self._ids)[self._num_given :]

    def _forget_bytes(self) -> None:
        """Drop bytes of complete characters: byte fallback shows none of a row while one is incomplete."""
        while self._ids and self._byte(self._ids[-1]) >= 0:
            self._ids.pop()
        self._num_done = len(self._ids)
        self._num_given = len(self._decode(self._ids))

    def _byte(self, token: int) -> int:
        """Return the byte that a token of byte fallback is, -1 for any other."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        found = _BYTE_PIECE.fullmatch(piece) if isinstance(piece, str) else None
        return -1 if found is None else int(found[1], 16)

    def _decode(self, ids: list[int]) -> str:
        return _decode(self._tokenizer, ids) if ids else ""


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """Return the bytes that a token stands for, of which a character may need several tokens."""
    piece = tokenizer.convert_ids_to_tokens(token)
    text = _decode(tokenizer, [token])
    if not isinstance(piece, str):
        return text.encode(errors="replace")
    byte = _BYTE_PIECE.fullmatch(piece)
    if byte:
        return bytes([int(byte[1], 16)])
    if piece.startswith(SPACE_MARK):
        return piece.replace(SPACE_MARK, " ").encode(errors="replace")
    if INCOMPLETE in text and all(character in _BYTES for character in piece):
        return bytes(_BYTES[character] for character in piece)
    return text.encode(errors="replace")


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _without_open_end(text: str) -> str:
    """Return a text without what a further token may make a character of."""
    num_open = min(len(text) - len(text.rstrip(INCOMPLETE)), MORE_BYTES)
    return text[: len(text) - num_open]


def _bytes_by_character() -> dict[str, int]:
    """Return which byte each character stands for in byte-level BPE: itself where it can be printed (GPT-2)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _bytes_by_character()
