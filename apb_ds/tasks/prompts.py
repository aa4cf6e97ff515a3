"""Cutting a chat into document and query, where the model's own template puts the boundary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# A text that no template contains: it shows where the template puts what the user says.
MARK = "\u2402user-text\u2403"
ONE_TURN_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Prompt:
    """Document and query as ids, and how many document tokens precede the user's text."""

    document_ids: list[int]
    query_ids: list[int]
    query_position: int


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of `text` as it stands: no special tokens are added, those written in it are recognised."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def split_prompt(tokenizer: Any, document: str, query: str, answer_prefix: str = "") -> Prompt:
    """Cut a prompt in two, so that the document does not depend on the query.

    The document is the first user turn rendered through the chat template, without a generation prompt. The query is
    the rest of the conversation: a second user turn, and an assistant turn opened with `answer_prefix`. Templates that
    refuse two user turns in a row get both in one turn, cut between them; tokenizers without a template get the
    begin-of-sequence token and plain text.
    """
    if not getattr(tokenizer, "chat_template", None):
        return _plain(tokenizer, document, query, answer_prefix)
    head, tail = split_rendering(tokenizer, document, query)
    return Prompt(*_encode_parts(tokenizer, head, tail + answer_prefix), len(encode(tokenizer, header(tokenizer))))


def document_length(tokenizer: Any, document: str, query: str) -> int:
    """Return how many tokens the document has, template included."""
    if not getattr(tokenizer, "chat_template", None):
        return len(_bos(tokenizer)) + len(encode(tokenizer, document))
    return len(encode(tokenizer, split_rendering(tokenizer, document, query)[0]))


def header(tokenizer: Any) -> str:
    """Return what the template puts before the user's text."""
    rendered = _render(tokenizer, [_user(MARK)], generation=False)
    return rendered[: _mark_index(rendered)]


def split_rendering(tokenizer: Any, document: str, query: str) -> tuple[str, str]:
    """Return the rendered conversation as (document, query) texts, the query's with the assistant turn opened."""
    first = _render(tokenizer, [_user(document)], generation=False)
    whole = _render_or_none(tokenizer, [_user(document), _user(query)])
    if whole is not None and whole.startswith(first):
        return first, whole[len(first) :]
    rendered = _render(tokenizer, [_user(MARK)], generation=True)
    start = _mark_index(rendered)
    tail = rendered[start + len(MARK) :]
    return rendered[:start] + document.strip(), ONE_TURN_SEPARATOR + query + tail


def _plain(tokenizer: Any, document: str, query: str, answer_prefix: str) -> Prompt:
    bos = _bos(tokenizer)
    tail = f"{ONE_TURN_SEPARATOR}{query}\n{answer_prefix}"
    document_ids, query_ids = _encode_parts(tokenizer, document, tail)
    return Prompt(bos + document_ids, query_ids, len(bos))


def _bos(tokenizer: Any) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _encode_parts(tokenizer: Any, head: str, tail: str) -> tuple[list[int], list[int]]:
    """Encode two texts so that together they are what the model would see, if the boundary is one between tokens.

    A SentencePiece tokenizer puts a space in front of a text that is encoded alone.
    """
    head_ids = encode(tokenizer, head)
    whole = encode(tokenizer, head + tail)
    if whole[: len(head_ids)] == head_ids:
        return head_ids, whole[len(head_ids) :]
    return head_ids, encode(tokenizer, tail)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _render(tokenizer: Any, messages: list[dict[str, str]], *, generation: bool) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)


def _render_or_none(tokenizer: Any, messages: list[dict[str, str]]) -> str | None:
    from jinja2.exceptions import TemplateError

    try:
        return _render(tokenizer, messages, generation=True)
    except TemplateError:
        return None


def _mark_index(rendered: str) -> int:
    index = rendered.find(MARK)
    if index < 0:
        raise ValueError(
            "the tokenizer's chat template leaves out what the user says; set model.tokenizer to one whose template "
            "renders a user turn."
        )
    return index
