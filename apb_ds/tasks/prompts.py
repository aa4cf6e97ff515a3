"""Cutting a chat into document and query, at the boundary that the model's own chat template sets.

The document is the first user turn, rendered through the template without a generation prompt. The query is the rest of
the conversation: a second user turn, and an assistant turn opened for the answer. So a document's ids do not depend on
the query, and one prefill serves many. Templates that refuse two user turns in a row, or that end the first one
differently when another follows, get both in one turn, cut between them; tokenizers without a template get the
begin-of-sequence token and plain text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from apb_ds.tasks.control import encode_masked, mask
from apb_ds.tasks.template import MARK, TemplateRefusal, has_template, render, user, with_template
from apb_ds.tasks.text import clean

ONE_TURN_SEPARATOR = "\n\n"
# Characters at the end of a document that can change how the following text is tokenised.
BOUNDARY_CONTEXT = 256
# A text whose end no tokenizer joins with what follows.
NEUTRAL = "a"


@dataclass(frozen=True)
class EncodedChat:
    """A document and a question about it as ids, cut where the chat template cuts them; on the CPU.

    Attributes
    ----------
    document_ids : (1, n), int64, the same for every question, so that one prefill serves many
    query_ids : (1, q), int64, the question after the document, with the answer opened
    embedded_ids : (1, e), int64, what the anchor embeds of the question: the query of `APBEngine.prefill`
    query_position : tokens of the document that precede the user's text, the `APBConfig` field of this name
    """

    document_ids: Tensor
    query_ids: Tensor
    embedded_ids: Tensor
    query_position: int


@dataclass(frozen=True)
class EncodedDocument:
    """A document as ids, ready for any query about it.

    Attributes
    ----------
    ids : tokens of the document, chat template included
    query_position : how many of them precede the user's text
    end : the last characters, which decide how the following text is tokenised
    allow_special : whether control tokens written in it, and in queries about it, take effect
    """

    ids: list[int]
    query_position: int
    end: str
    allow_special: bool = False

    @cached_property
    def tensor(self) -> Tensor:
        """The ids, (1, n), int64."""
        return torch.tensor([self.ids])


def encode_chat(
    tokenizer: Any,
    document: str,
    question: str,
    *,
    system: str | None = None,
    template: Mapping[str, Any] | None = None,
    allow_special_tokens: bool = False,
) -> EncodedChat:
    """Return a document and a question about it as ids, as the command line encodes them.

    Parameters
    ----------
    tokenizer : the model's own; without a chat template, document and question become plain text
    document, question : texts
    system : a system prompt, which precedes the document
    template : arguments of the chat template, such as ``{"enable_thinking": False}``
    allow_special_tokens : whether control tokens written in the texts take effect; otherwise they are text

    Raises
    ------
    ValueError
        For an empty text, or a chat template that does not take the system prompt or the arguments.
    """
    document, question = _cleaned("document", document), _cleaned("question", question)
    system = None if system is None else _cleaned("system", system)
    tokenizer = with_template(tokenizer, system, template, allow_special=allow_special_tokens)
    encoded = encode_document(tokenizer, document, allow_special=allow_special_tokens)
    return EncodedChat(
        document_ids=encoded.tensor,
        query_ids=torch.tensor([encode_query(tokenizer, encoded, question)]),
        embedded_ids=torch.tensor([encode_embedded(tokenizer, encoded, question)]),
        query_position=encoded.query_position,
    )


def encode_turn(
    tokenizer: Any,
    question: str,
    answer_ids: Tensor,
    *,
    system: str | None = None,
    template: Mapping[str, Any] | None = None,
    allow_special_tokens: bool = False,
) -> Tensor:
    """Return a further question's ids, (1, q), int64, for a context that keeps question and answer (``append=True``).

    Parameters
    ----------
    answer_ids : (1, new), int64, the previous answer: what ended it decides how the template goes on
    tokenizer, system, template, allow_special_tokens : as in `encode_chat`
    """
    question = _cleaned("question", question)
    system = None if system is None else _cleaned("system", system)
    tokenizer = with_template(tokenizer, system, template, allow_special=allow_special_tokens)
    if not isinstance(answer_ids, Tensor) or answer_ids.dim() != 2 or answer_ids.shape[1] == 0:
        shown = tuple(answer_ids.shape) if isinstance(answer_ids, Tensor) else type(answer_ids).__name__
        raise ValueError(f"answer_ids must be what engine.generate returned, (1, new), got {shown}.")
    last_id = int(answer_ids[0, -1])
    return torch.tensor([encode_next_turn(tokenizer, question, last_id, allow_special=allow_special_tokens)])


def _cleaned(name: str, text: object) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a text, got {type(text).__name__}.")
    text, problem = clean(text)
    if problem:
        raise ValueError(f"{name} {problem}.")
    return text


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of `text` as it stands: no special tokens are added, those written in it take effect.

    Mask text from elsewhere first (`mask`), so that it is only text.

    Raises
    ------
    ValueError
        If the text is not Unicode, as when a command-line argument was not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text is not Unicode: half a surrogate pair (\\u{ord(text[error.start]):04x}) at character "
            f"{error.start} of {text[error.start : error.start + 40]!a}; give it as UTF-8."
        ) from error
    return encode_masked(tokenizer, text)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text that is not a prompt; what looks like a control token in it is text."""
    return encode(tokenizer, mask(tokenizer, text))


def encode_document(tokenizer: Any, document: str, *, allow_special: bool = False) -> EncodedDocument:
    """Return the document as ids, tokenised once.

    Parameters
    ----------
    allow_special : bool
        Whether control tokens written in the document, and in queries about it, take effect. Otherwise they are text,
        and only the template's own take effect.

    Raises
    ------
    ValueError
        If the document is empty.
    """
    if not document.strip():
        raise ValueError("the document is empty; it needs some text.")
    document = document if allow_special else mask(tokenizer, document)
    if not has_template(tokenizer):
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return EncodedDocument(bos + encode(tokenizer, document), len(bos), document[-BOUNDARY_CONTEXT:], allow_special)
    text = render_document(tokenizer, document)
    ids = encode(tokenizer, text)
    # The header's last token may differ when the user's text follows it.
    position = num_equal(encode(tokenizer, header(tokenizer)), ids)
    return EncodedDocument(ids, position, text[-BOUNDARY_CONTEXT:], allow_special)


def encode_query(tokenizer: Any, document: EncodedDocument, query: str, answer_prefix: str = "") -> list[int]:
    """Return the ids of a query about a document, up to where the answer begins; ValueError for an empty query.

    White space around the query is dropped.
    """
    query, answer_prefix = _as_text(tokenizer, query, answer_prefix, document.allow_special)
    return encode_after(tokenizer, document.end, render_query(tokenizer, query) + answer_prefix)


def encode_embedded(tokenizer: Any, document: EncodedDocument, query: str) -> list[int]:
    """Return the ids of a query as the anchor embeds it: its text alone, before the document's in the user's turn.

    What closes the turn and opens the answer is left out: a block that sees it before its own tokens takes these for
    part of the answer. ValueError for an empty query.
    """
    query, _ = _as_text(tokenizer, query, "", document.allow_special)
    before = header(tokenizer) if has_template(tokenizer) else NEUTRAL
    return encode_after(tokenizer, before, query + ONE_TURN_SEPARATOR)


def encode_next_turn(
    tokenizer: Any, query: str, last_id: int, answer_prefix: str = "", *, allow_special: bool = False
) -> list[int]:
    """Return the ids of a further query in a conversation, from the end of the previous answer; ValueError if empty.

    Parameters
    ----------
    last_id : the last token of that answer. The template closes an answer with an end token, which the model has
        generated itself unless the answer was cut short.
    answer_prefix : how the answer begins
    allow_special : as in `encode_document`
    """
    query, answer_prefix = _as_text(tokenizer, query, answer_prefix, allow_special)
    ids = encode_after(tokenizer, NEUTRAL, _render_next_turn(tokenizer, query) + answer_prefix)
    if len(ids) > 1 and ids[0] == last_id:
        return ids[1:]
    # Some templates put a space before the end token.
    if len(ids) > 2 and ids[1] == last_id in tokenizer.all_special_ids and not tokenizer.decode(ids[:1]).strip():
        return ids[2:]
    return ids


def header(tokenizer: Any, system: str | None = None) -> str:
    """Return what the template puts before the user's text, after a system prompt if there is one."""
    before = [] if system is None else [{"role": "system", "content": system}]
    rendered = render(tokenizer, [*before, user(MARK)], generation=False)
    return rendered[: _mark_index(rendered)]


def render_document(tokenizer: Any, document: str) -> str:
    """Return the document's part of the conversation as text."""
    if _second_turn(tokenizer, MARK) is None:
        return header(tokenizer) + document.strip()
    return render(tokenizer, [user(document)], generation=False)


def render_query(tokenizer: Any, query: str) -> str:
    """Return the query's part of the conversation as text, with the assistant's turn opened."""
    if not has_template(tokenizer):
        return f"{ONE_TURN_SEPARATOR}{query}\n"
    second = _second_turn(tokenizer, query)
    if second is not None:
        return second
    rendered = render(tokenizer, [user(MARK + ONE_TURN_SEPARATOR + query)], generation=True)
    return rendered[_mark_index(rendered) + len(MARK) :]


def encode_after(tokenizer: Any, before: str, text: str) -> list[int]:
    """Return the ids of `text` as they follow `before`, if a token ends at the boundary.

    Control tokens written in `text` take effect, as in `encode`. Encoding the text alone is the last resort: a
    SentencePiece tokenizer puts a space in front of it.
    """
    for context in (before, NEUTRAL):
        start = encode(tokenizer, context)
        whole = encode(tokenizer, context + text)
        if whole[: len(start)] == start:
            return whole[len(start) :]
    return encode(tokenizer, text)


def num_equal(first: list[int], second: list[int]) -> int:
    """Return the length of the common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))


def _second_turn(tokenizer: Any, query: str) -> str | None:
    """Return what a second user turn adds to the first, with the answer opened; None if the template refuses it."""
    first = render(tokenizer, [user(MARK)], generation=False)
    try:
        whole = render(tokenizer, [user(MARK), user(query)], generation=True)
    except TemplateRefusal:
        return None
    return whole[len(first) :] if whole.startswith(first) else None


def _render_next_turn(tokenizer: Any, query: str) -> str:
    if not has_template(tokenizer):
        return f"{ONE_TURN_SEPARATOR}{query}\n"
    before = [user("document"), user("query")]
    if _second_turn(tokenizer, "query") is None:
        before = [user("document and query")]
    rendered = render(tokenizer, [*before, {"role": "assistant", "content": MARK}, user(query)], generation=True)
    return rendered[_mark_index(rendered, "assistant") + len(MARK) :]


def _as_text(tokenizer: Any, query: str, answer_prefix: str, allow_special: bool) -> tuple[str, str]:
    """Return both without white space around the query, and without control tokens unless they are allowed."""
    query = query.strip()
    if not query:
        raise ValueError("the query is empty; ask something.")
    return (query, answer_prefix) if allow_special else (mask(tokenizer, query), mask(tokenizer, answer_prefix))


def _mark_index(rendered: str, role: str = "user") -> int:
    index = rendered.find(MARK)
    if index < 0:
        raise ValueError(
            f"the tokenizer's chat template omits what the {role} says; set model.tokenizer to one whose template "
            "renders every turn."
        )
    return index
