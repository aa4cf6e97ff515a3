"""Prompts as ids, cut into a document, which is prefilled once and kept, and what follows it.

Where the cut is depends on the prompt alone, never on what was asked before or is stored, or answers would depend on
it. Of a chat, the document ends with the first part of a message that brings it to `min_document` tokens, each part
counted by itself. Where that part is the last before an answer, it holds its question, too, and is cut before that; so
is the prompt of a completion. A prompt without a long beginning has no document.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from apb_ds.engine.split import document_length, question_places
from apb_ds.serving.errors import ApiError
from apb_ds.serving.requests import Message, Prompt
from apb_ds.tasks.control import mask
from apb_ds.tasks.prompts import BOUNDARY_CONTEXT, encode, encode_after
from apb_ds.tasks.template import MARK, ChatTokenizer, TemplateRefusal, has_template, render
from apb_ds.tasks.text import clean
from apb_ds.utils.text import first_line

JOINT = "\n\n"  # between the parts of a message
# A text of so many characters for each token of a limit almost certainly reaches it; if not, all of it is counted.
CHARACTERS_PER_TOKEN = 8
CACHED_TEXTS = 64


class Prompts:
    """Makes prompts of chats and texts. Its methods may be called from several threads.

    Parameters
    ----------
    tokenizer : the model's
    min_document : tokens from which on the beginning of a prompt is a document
    split : the text before whose last occurrence a document and its question are cut
    max_rest : tokens that may follow a document
    max_positions : tokens of prompt and answer together; None for no limit
    vocab_size : ids that the model has
    template : arguments of the chat template
    """

    def __init__(
        self,
        tokenizer: Any,
        min_document: int,
        split: str,
        max_rest: int,
        max_positions: int | None,
        vocab_size: int,
        template: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = ChatTokenizer(tokenizer, None, template or {})
        self._min_document = min_document
        self._split = split
        self._max_rest = max_rest
        self._max_positions = max_positions
        self._vocab_size = vocab_size
        begun = list(tokenizer("")["input_ids"])
        self._start = begun[:1] if begun[:1] == [tokenizer.bos_token_id] else []  # as the tokenizer begins a text
        self._ids = _Recent(CACHED_TEXTS)
        self._counts = _Recent(CACHED_TEXTS)

    def chat(self, messages: Sequence[Message]) -> Prompt:
        """Return a chat as a prompt, with the answer opened.

        Raises
        ------
        ApiError
            For a text that is none, a conversation that the template refuses, and one that is too long.
        """
        if not has_template(self._tokenizer):
            raise ApiError(
                400, "This model has no chat template. Use /v1/completions.", param="messages", code="no_chat_template"
            )
        parts = [
            [mask(self._tokenizer, _checked(part, f"messages[{index}].content")) for part in message.parts]
            for index, message in enumerate(messages)
        ]
        whole = [_message(message.role, part) for message, part in zip(messages, parts, strict=True)]
        try:
            text = render(self._tokenizer, whole, generation=True)
            cut = self._cut_of_chat(messages, parts, whole, text)
        except TemplateRefusal as error:
            roles = ", ".join(message.role for message in messages)
            why = first_line(error.__cause__ or error)
            raise ApiError(
                400, f"The model's chat template does not take a conversation of {roles}: {why}.", param="messages"
            ) from error
        return self._prompt(text, cut, "messages")

    def text(self, text: str | Sequence[int]) -> Prompt:
        """Return a completion's prompt, text or ids; ApiError as `chat`.

        Control tokens in a text take effect: clients that apply the chat template themselves write them.
        """
        if not isinstance(text, str):
            return self._of_ids(text)
        text = _checked(text, "prompt")
        has_start = bool(self._start) and text.startswith(self._tokenizer.bos_token)
        return self._prompt(text, self._cut_within(text), "prompt", [] if has_start else self._start)

    # --- where the cut is --------------------------------------------------------------------------------------------

    def _cut_of_chat(
        self, messages: Sequence[Message], parts: list[list[str]], whole: list[dict[str, str]], text: str
    ) -> int:
        """Return the characters of a rendered chat that are its document; 0 for none."""
        total = 0
        for index, (message, texts) in enumerate(zip(messages, parts, strict=True)):
            is_last = index == len(messages) - 1
            for place, part in enumerate(texts):
                needed = self._min_document - total
                total += self._count(part, needed)
                if total < self._min_document:
                    continue
                ends_message = place == len(texts) - 1
                if ends_message and message.role == "user" and (is_last or messages[index + 1].role == "assistant"):
                    part = part[: self._cut_within(part, needed)]  # it holds its question
                elif ends_message:
                    return 0 if is_last else self._end_of(whole, index, text)
                return self._place_of(whole, index, JOINT.join([*texts[:place], part]), text) if part else 0
        return 0

    def _cut_within(self, text: str, needed: int | None = None) -> int:
        """Return the characters of a text that come before its question, 0 if that leaves too little.

        Parameters
        ----------
        needed : tokens that must come before it
        """
        needed = self._min_document if needed is None else needed
        limit = self._min_document
        *places, last = question_places(text, self._split)
        place = next((place for place in places if self._count(text[place:], limit) < limit), last)
        return place if place and self._count(text[:place], needed) >= needed else 0

    def _end_of(self, whole: list[dict[str, str]], index: int, text: str) -> int:
        """Return where a message ends in the rendered chat."""
        rendered = render(self._tokenizer, whole[: index + 1], generation=False)
        if text.startswith(rendered):
            return len(rendered)
        return self._place_of(whole, index, whole[index]["content"], text)  # some templates end the last one otherwise

    def _place_of(self, whole: list[dict[str, str]], index: int, kept: str, text: str) -> int:
        """Return where the first characters of a message end in the rendered chat, 0 if the template changes them."""
        kept = kept.rstrip()
        marked = [*whole[:index], {**whole[index], "content": kept + MARK}, *whole[index + 1 :]]
        rendered = render(self._tokenizer, marked, generation=True)
        place = rendered.rfind(MARK)
        return place if place > 0 and text.startswith(rendered[:place]) else 0

    # --- ids ---------------------------------------------------------------------------------------------------------

    def _prompt(self, text: str, cut: int, param: str, start: list[int] | None = None) -> Prompt:
        """Return a text as a prompt; its ids begin with `start`."""
        try:
            if cut == 0:
                ids = torch.tensor((start or []) + encode(self._tokenizer, text))
                document, rest = ids[:0], ids
            else:
                document = self._ids_of(text[:cut], start or [])
                rest = torch.tensor(
                    encode_after(self._tokenizer, text[max(0, cut - BOUNDARY_CONTEXT) : cut], text[cut:])
                )
        except ValueError as error:
            raise ApiError(400, str(error), param=param) from error
        return self._checked_prompt(document, rest, param)

    def _of_ids(self, ids: Sequence[int]) -> Prompt:
        if not ids:
            raise ApiError(400, "prompt is empty; give it a text, or token ids.", param="prompt")
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            raise ApiError(400, f"prompt must have token ids from 0 to {self._vocab_size - 1}.", param="prompt")
        found = torch.tensor(list(ids))
        cut = document_length(len(found), self._min_document)
        return self._checked_prompt(found[:cut], found[cut:], "prompt")

    def _checked_prompt(self, document: Tensor, rest: Tensor, param: str) -> Prompt:
        if len(document) + len(rest) < 2:
            raise ApiError(400, f"{param} must have two tokens at least.", param=param)
        prompt = Prompt(document, rest, key_of(document) if len(document) else "")
        if len(rest) > self._max_rest:
            raise ApiError(
                400,
                f"{len(rest)} tokens follow the document, and this server takes {self._max_rest} (serve.max_rest). Put "
                "long texts into the document, at the beginning.",
                param=param,
                code="context_length_exceeded",
            )
        if self._max_positions is not None and prompt.num_tokens >= self._max_positions:
            raise too_long(self._max_positions, prompt.num_tokens, None, param)
        return prompt

    def _ids_of(self, text: str, start: list[int]) -> Tensor:
        """Return a document's ids, (tokens,), int64, tokenised once."""
        digest = _digest(text) + bytes(bool(start))
        found = self._ids.get(digest)
        if found is None:
            found = torch.tensor(start + encode(self._tokenizer, text))
            self._ids.put(digest, found)
        return found

    def _count(self, text: str, limit: int) -> int:
        """Return how many tokens a text has, at least `limit` if it has more."""
        begin = text[: limit * CHARACTERS_PER_TOKEN]
        count = self._count_all(begin)
        return count if count >= limit or len(begin) == len(text) else self._count_all(text)

    def _count_all(self, text: str) -> int:
        digest = _digest(text)
        count = self._counts.get(digest)
        if count is None:
            count = len(encode(self._tokenizer, text))
            self._counts.put(digest, count)
        return int(count)


class _Recent:
    """The most recently used values, by key."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[bytes, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Any:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: bytes, value: Any) -> None:
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self._size:
                self._values.popitem(last=False)


def key_of(document: Tensor) -> str:
    """Return the key of a document, from its ids, (n,), int64, on the CPU."""
    return hashlib.sha256(document.numpy().tobytes()).hexdigest()


def too_long(limit: int, num_prompt: int, num_asked: int | None, param: str) -> ApiError:
    """Return the refusal of a prompt that leaves no room for its answer, or less than the tokens asked for."""
    left = max(0, limit - num_prompt)
    asked = "" if num_asked is None else f", and {num_asked} were asked for"
    return ApiError(
        400,
        f"This model's maximum context length is {limit} tokens. The prompt has {num_prompt}, so {left} are left for "
        f"the answer{asked}.",
        param=param,
        code="context_length_exceeded",
    )


def _checked(text: str, param: str) -> str:
    text, problem = clean(text, may_be_blank=True)
    if problem:
        raise ApiError(400, f"{param} {problem}.", param=param)
    return text


def _message(role: str, parts: Sequence[str]) -> dict[str, str]:
    return {"role": role, "content": JOINT.join(parts)}


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
