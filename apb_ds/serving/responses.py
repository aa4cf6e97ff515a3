"""Answers as OpenAI's API has them, whole and in chunks."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from apb_ds.serving.detokenizing import token_bytes
from apb_ds.serving.requests import Delta, Ended, Prompt, TokenLogprobs


class Response:
    """What is said of one answer; see `ChatResponse` and `CompletionResponse`.

    Parameters
    ----------
    tokenizer : the model's, for the texts of tokens
    model : its name
    prompt : what is answered
    """

    prefix: str
    whole: str
    chunk: str

    def __init__(self, tokenizer: Any, model: str, prompt: Prompt) -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._text = ""
        self._logprobs: list[Any] = []
        self.has_logprobs = False
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._head = {"id": self.id, "created": int(time.time()), "model": model}

    def add(self, delta: Delta) -> dict[str, Any] | None:
        """Take more of the answer; return its chunk, None for nothing to say yet."""
        logprobs = self._logprobs_of(delta)
        self._text += delta.text
        if not delta.text and not delta.logprobs:
            return None
        return self._chunk(delta.text, logprobs, None)

    def first(self) -> dict[str, Any] | None:
        """Return the chunk that comes first, if there is one."""
        return None

    def last(self, ended: Ended) -> dict[str, Any]:
        """Return the chunk that says why the answer has ended."""
        return self._chunk("", None, ended.reason)

    def usage(self, ended: Ended) -> dict[str, Any]:
        """Return the numbers of tokens."""
        return {
            "prompt_tokens": self._prompt.num_tokens,
            "completion_tokens": ended.new_tokens,
            "total_tokens": self._prompt.num_tokens + ended.new_tokens,
            "prompt_tokens_details": {"cached_tokens": ended.cached_tokens},
        }

    def usage_chunk(self, ended: Ended) -> dict[str, Any]:
        """Return the chunk of a stream whose client wants the numbers."""
        return {**self._head, "object": self.chunk, "choices": [], "usage": self.usage(ended)}

    def complete(self, ended: Ended) -> dict[str, Any]:
        """Return the whole answer."""
        choice = {"index": 0, **self._content(self._text), "logprobs": self._all_logprobs()}
        choice["finish_reason"] = ended.reason
        return {**self._head, "object": self.whole, "choices": [choice], "usage": self.usage(ended)}

    def _chunk(self, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, **self._delta(text, reason), "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "object": self.chunk, "choices": [choice]}

    def _content(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, text: str, reason: str | None) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs_of(self, delta: Delta) -> Any:
        raise NotImplementedError

    def _all_logprobs(self) -> Any:
        raise NotImplementedError

    def _text_of(self, token: int) -> str:
        """Return a token's text; a token's that is part of a character as OpenAI's completions show it."""
        data = token_bytes(self._tokenizer, token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class ChatResponse(Response):
    """An answer of /v1/chat/completions."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self) -> dict[str, Any]:
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return {**self._head, "object": self.chunk, "choices": [choice]}

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str, reason: str | None) -> dict[str, Any]:
        return {"delta": {} if reason is not None else {"content": text}}

    def _logprobs_of(self, delta: Delta) -> Any:
        if not delta.logprobs:
            return None
        found = [self._entry(*pair) for pair in zip(delta.tokens, delta.logprobs, strict=True)]
        self._logprobs += found
        return {"content": found, "refusal": None}

    def _entry(self, token: int, logprobs: TokenLogprobs) -> dict[str, Any]:
        return {
            **self._token(token, logprobs.logprob),
            "top_logprobs": [self._token(other, value) for other, value in logprobs.top],
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = list(token_bytes(self._tokenizer, token))
        return {"token": self._text_of(token), "logprob": max(logprob, -9999.0), "bytes": data}

    def _all_logprobs(self) -> Any:
        return {"content": self._logprobs, "refusal": None} if self.has_logprobs else None


class CompletionResponse(Response):
    """An answer of /v1/completions."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _delta(self, text: str, reason: str | None) -> dict[str, Any]:
        return {"text": text}

    def _logprobs_of(self, delta: Delta) -> Any:
        if not delta.logprobs:
            return None
        found = [
            (self._text_of(token), max(one.logprob, -9999.0), self._top(one), len(self._text))
            for token, one in zip(delta.tokens, delta.logprobs, strict=True)
        ]
        self._logprobs += found
        return _in_columns(found)

    def _top(self, logprobs: TokenLogprobs) -> dict[str, float]:
        return {self._text_of(token): max(value, -9999.0) for token, value in logprobs.top}

    def _all_logprobs(self) -> Any:
        return _in_columns(self._logprobs) if self.has_logprobs else None


def _in_columns(rows: list[Any]) -> dict[str, list[Any]]:
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [row[index] for row in rows] for index, name in enumerate(names)}


def event(value: Any) -> bytes:
    """Return a server-sent event."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode("utf-8", "replace")


def comment(text: str) -> bytes:
    """Return a comment, which clients skip."""
    return f": {text}\n\n".encode()
